"""Structured pruning of 21 models: fxc beside torch-pruning. `python -m benchmarks.pruning`."""
