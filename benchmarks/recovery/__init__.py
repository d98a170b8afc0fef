"""What training gives back after compression, strategy by strategy: `python -m benchmarks.recovery`."""
