"""The nccl transport."""
