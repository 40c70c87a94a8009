"""Latency models, workload, simulator, placement search, controller: deciding how many of what."""
