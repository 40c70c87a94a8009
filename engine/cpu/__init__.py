"""What the CPU computes with: attention, matrix products in measured layouts, and the passes between."""
