"""Compiles the CPU kernels before they are first used: ``python -m rpqfx.compile_kernels``.

The first product on a CPU compiles them otherwise, which takes up to a minute. In the image of a container, or before
jobs of many processes, that is better done once, beforehand.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from rpqfx.errors import RPQError
from rpqfx.ops.cpu import build


def load() -> Path:
    """Compiles, checks and loads the kernels, so that packages of AOTInductor that call them can be loaded.

    Returns:
        The library's file. ``torch.ops.load_library`` (or ``dlopen`` in C++) of it is all that a process without this
        library needs; it fits the torch and the kind of processor that it was compiled with.

    Raises:
        RPQError: If the kernels cannot be used here; it says why.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same words are in the error
        if not build.ready():
            raise RPQError(f"the CPU kernels cannot be used: {build.reason()}")
    return build.compiled()


def main() -> int:
    """Compiles, loads and checks the kernels, and says where they are.

    Returns:
        0 where they will be used, else 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"the CPU kernels are ready: {load()}")
    except RPQError:
        return 1  # the log has said why
    return 0


if __name__ == "__main__":
    sys.exit(main())
