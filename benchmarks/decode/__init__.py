"""A language model end to end, in tokens a second. `python -m benchmarks.decode`."""
