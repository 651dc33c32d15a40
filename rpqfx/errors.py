"""Everything that rpqfx raises on purpose.

Each message says what was seen, what was expected and the likely next move. All kinds derive from
``RPQError``, so ``except rpqfx.RPQError`` catches whatever the library refuses, and each also derives
from the builtin that a caller would expect (``ValueError``, ``TypeError``, ...).
"""

from __future__ import annotations


class RPQError(Exception):
    """Base of every error that rpqfx raises on purpose."""


class SpecError(RPQError, ValueError):
    """A codebook shape that cannot be: a count that does not divide, too many entries, a bad argument."""


class InputError(RPQError, TypeError):
    """A tensor that an operation cannot take: complex, of another dtype than the codebooks, of a wrong width."""


class CodeError(RPQError, IndexError):
    """Codes that point outside their codebook."""


class PolicyError(RPQError, ValueError):
    """A policy that cannot be followed: it matches nothing, or asks for what a site cannot give."""


class CaptureError(RPQError, RuntimeError):
    """A model that cannot be read: lazy modules that never ran, a forward that cannot be traced whole."""


class RewriteError(RPQError, RuntimeError):
    """A rewrite that cannot be carried out, or whose result is not what the dense model computes."""


class FormatError(RPQError, RuntimeError):
    """A saved file that is truncated, altered, newer than this library, or of another model."""


class TrainingError(RPQError, ArithmeticError):
    """A fine-tuning that came to a loss or a gradient that is not finite."""


class DistributedError(RPQError, RuntimeError):
    """Processes that do not hold the same model, or a module that cannot be shared out over them as asked."""
