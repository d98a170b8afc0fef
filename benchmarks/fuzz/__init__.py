"""Random networks, passes, words and damage, drawn by a seed: what fxc does with them. `python -m benchmarks.fuzz`."""
