"""The policy that trains what other passes have left."""
