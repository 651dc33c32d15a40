"""Weights of a model into codebooks, with or without data, and back."""
