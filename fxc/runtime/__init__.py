"""What runs a compiled model: artifacts on disk, the module with the original signature, generation."""
