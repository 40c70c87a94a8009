"""CUDA devices as transports use them, and the cuda_ipc transport."""
