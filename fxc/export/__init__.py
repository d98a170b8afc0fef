"""A compiled model as other tools know it."""
