"""Compiles the CPU kernels before they are first used: ``python -m rpqfx.compile_kernels``.

The first product on a CPU compiles them otherwise, which takes about a minute. In the image of a container, or before
jobs of many processes, that is better done once, beforehand.
"""

from __future__ import annotations

import logging
import sys
import warnings

from rpqfx.ops.cpu import build


def main() -> int:
    """Compiles, loads and checks the kernels, and says where they are.

    Returns:
        0 where they will be used, else 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same words are in the log
        usable = build.ready()
    if usable:
        print(f"the CPU kernels are ready: {build.compiled()}")
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main())
