"""Wire codecs: how the bytes of a KV block are written between two workers."""
