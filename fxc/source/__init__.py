"""From the name of a model to an nn.Module: everything is checked before anything is loaded."""
