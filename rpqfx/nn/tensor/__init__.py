"""What a module's own code reads in the place of a weight that lives in codebooks."""
