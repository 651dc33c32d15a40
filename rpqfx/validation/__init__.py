"""Checks of values, names and arguments that callers give."""
