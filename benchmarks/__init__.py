"""Measurements of fxc beside its peers. Each is a program: `python -m benchmarks.models`."""
