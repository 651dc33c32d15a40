"""What fine-tuning a model in codebooks is made of."""

from rpqfx.training.distillation import Distillation
from rpqfx.training.parameters import Rates

__all__ = ["Distillation", "Rates"]
