"""Triton kernels; each has a float64 reference in its test and runs in the interpreter without a GPU."""
