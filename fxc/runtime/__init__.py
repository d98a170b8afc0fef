"""Decoding over a cache of fixed size, on CUDA as a recorded graph."""
