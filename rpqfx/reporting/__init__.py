"""Sizes, tables, reports and the progress of long calls."""
