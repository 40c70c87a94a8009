"""The CUDA back-end: kernels, attention choices, graphs and the memory plan."""
