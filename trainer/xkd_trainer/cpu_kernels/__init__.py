"""cpu_kernels."""
