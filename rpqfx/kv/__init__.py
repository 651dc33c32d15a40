"""Caches of keys and values in codebooks."""
