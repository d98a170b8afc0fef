"""Single linear layers against their limits and their rivals: what `fxc bench kernels` measures."""
