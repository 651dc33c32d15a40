"""The tensors that a module's own code reads in place of a quantized weight."""
