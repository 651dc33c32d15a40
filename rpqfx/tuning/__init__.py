"""What fine-tuning a model in codebooks is made of."""

from rpqfx.tuning.losses import Distillation
from rpqfx.tuning.trained import Rates

__all__ = ["Distillation", "Rates"]
