"""Attention of queries to keys and values that are codes."""
