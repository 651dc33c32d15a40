"""Figures that tests measure on the side, kept where ``RPQFX_RESULTS`` names a folder.

RPQFX_RESULTS=examples/results pytest -m slow tests/...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import results

FOLDER = "RPQFX_RESULTS"


def record(name: str, command: str, **figures: Any) -> None:
    """Writes figures of a test where the environment asks for them.

    Args:
        name: Name of the result, with folders.
        command: What measures them again.
        **figures: Plain values.
    """
    folder = os.environ.get(FOLDER)
    if folder:
        results.write(name, command, figures, Path(folder))
