"""The products and searches on a GPU, in Triton."""
