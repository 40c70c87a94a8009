"""Requests to simulate: when they come and how long they are."""
