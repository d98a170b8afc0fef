"""Gates: what is checked after every pass."""
