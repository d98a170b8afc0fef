"""The policy that masks what a model can do without."""
