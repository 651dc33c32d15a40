"""Training of quantized models: fine-tuning, and codes that are learnt from scratch."""

from rpqfx.training.distillation import Distillation
from rpqfx.training.parameters import Rates

__all__ = ["Distillation", "Rates"]
