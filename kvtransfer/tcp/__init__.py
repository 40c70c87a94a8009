"""The tcp transport."""
