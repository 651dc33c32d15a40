"""The residual vector quantizer of the last axis of a tensor; it can be used alone."""
