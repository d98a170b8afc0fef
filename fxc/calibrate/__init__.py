"""Compressing weights by what data says of them: algorithms on tensors, one a file, that know nothing of graphs."""
