"""Saved files: their containers, their manifests, and models in them."""
