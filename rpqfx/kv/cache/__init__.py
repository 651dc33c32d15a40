"""The cache of one attention layer: codes of most tokens, and the recent ones as they are."""
