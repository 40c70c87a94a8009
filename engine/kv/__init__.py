"""The paged KV cache: its tensor, its blocks, and which prefix each holds."""
