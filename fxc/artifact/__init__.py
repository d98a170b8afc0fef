"""What is written and read: the folder of a compiled model."""
