"""What removal is worth, in time and in quality. `python -m benchmarks.removal`."""
