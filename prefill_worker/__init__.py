"""Reads prompts: prompt in, first token and KV out."""
