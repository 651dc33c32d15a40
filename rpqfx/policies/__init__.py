"""What each weight of a model gets: its codebooks, or that it stays dense."""
