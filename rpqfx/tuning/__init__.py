"""What fine-tuning a model in codebooks is made of."""
