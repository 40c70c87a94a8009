"""Writes tokens: KV in, tokens out."""
