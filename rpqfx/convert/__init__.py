"""Weights of a trained model into codebooks, with an eye on what the model does with them."""

from rpqfx.convert.conversion import convert

__all__ = ["convert"]
