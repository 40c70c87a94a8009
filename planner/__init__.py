"""Latency models, workload, simulator, placement search, controller: where Tandem decides how many of what."""
