"""Saved calibrations as ``quantize_kv`` takes them. The storage package registers its reader here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from torch import nn

CalibrationPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class SavedCalibration(Protocol):
    """Coders of a model's attention, with the policy that they were fitted under."""

    def check(self, model: nn.Module) -> None:
        """Raises unless the coders are of a model like this one.

        Args:
            model: Dense, or with quantized weights.
        """

    def put(self, model: nn.Module) -> None:
        """Has the model's attention go through the coders, in place.

        Args:
            model: As it was checked.
        """


Opener = Callable[[CalibrationPath], SavedCalibration]
_OPENERS: list[Opener] = []


def opens_calibrations(opener: Opener) -> Opener:
    """Registers the function that opens files of calibrations.

    Args:
        opener: Called with a path.
    """
    _OPENERS[:] = [opener]
    return opener


def opened(path: CalibrationPath) -> SavedCalibration:
    """Returns a calibration that was saved.

    Args:
        path: Of the file.
    """
    return _OPENERS[-1](path)
