"""Weights of a trained model into codebooks, with an eye on what the model does with them."""

from rpqfx.conversion.conversion import convert

__all__ = ["convert"]
