"""Edge: loops that numba compiles; each gets the address of its arguments, int64 [n], on every thread.

Addresses among the arguments point to contiguous float32 or int64 numbers, strides count numbers. Nothing is
checked here: the launchers in engine/native do that.
"""
