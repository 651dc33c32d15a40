"""Which way of a product is fastest, measured."""
