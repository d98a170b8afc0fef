"""Inputs of a program: from a text, rows, images, tensors, or made up from its signature."""
