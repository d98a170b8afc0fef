"""Every Triton kernel against its reference on a GPU. `python -m benchmarks.gpu_checks`."""
