"""Which placements there are, what each can serve, and which mix of them is best."""
