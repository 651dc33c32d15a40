"""Calibration batches, and what a model shows when it runs on them."""
