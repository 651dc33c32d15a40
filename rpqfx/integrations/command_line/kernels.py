"""``rpqfx kernels`` compiles the CPU kernels before they are first used.

The first product on a CPU compiles them otherwise, which takes up to a minute. In the image of a container, or before
jobs of many processes, that is better done once, beforehand.
"""

from __future__ import annotations

import logging

from rpqfx.errors import RPQError
from rpqfx.ops.cpu.prepare import load_kernels


def run() -> int:
    """Compiles, loads and checks the kernels, and says where they are.

    Returns:
        0 where they will be used, else 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"the CPU kernels are ready: {load_kernels()}")
    except RPQError:
        return 1  # the log has said why
    return 0
