"""The hand-off protocol, and its two sides."""
