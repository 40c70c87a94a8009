"""Edge: the CPU's decode step in native loops, where torch's operators would each be a pass of their own."""
