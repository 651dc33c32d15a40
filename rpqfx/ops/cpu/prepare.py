"""Compiles, checks and loads the CPU kernels before they are first used."""

from __future__ import annotations

import warnings
from pathlib import Path

from rpqfx.errors import RPQError
from rpqfx.ops.cpu import build


def load_kernels() -> Path:
    """Compiles, checks and loads the CPU kernels, which otherwise happens when they are first used.

    Packages of AOTInductor that call the kernels can be loaded after this.

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
