"""Lowering: a portable program becomes the fastest callable for the machine at hand."""
