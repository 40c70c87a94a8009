"""A model's files: found, converted, read; its tokenizer and chat template."""
