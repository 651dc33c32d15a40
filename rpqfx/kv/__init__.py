"""Keys and values of attention held in codebooks."""
