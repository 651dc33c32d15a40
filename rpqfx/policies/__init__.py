"""Policies, which decide for each weight of a model which codebooks it gets, or that it stays dense."""
