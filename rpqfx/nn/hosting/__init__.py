"""Modules whose own code reads a weight that lives in codebooks."""
