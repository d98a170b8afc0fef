"""Training a program: what of it is trained, on what, by which loss."""
