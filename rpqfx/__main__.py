"""The command line: ``python -m rpqfx kernels`` compiles the CPU kernels before they are first used.

The first product on a CPU compiles them otherwise, which takes up to a minute. In the image of a container, or before
jobs of many processes, that is better done once, beforehand.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from rpqfx.errors import RPQError
from rpqfx.ops.cpu.prepare import load_kernels


def _kernels(_: argparse.Namespace) -> int:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What was typed after the program's name; ``sys.argv[1:]`` if left out.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser("rpqfx", description="Models whose weights live in codebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser("kernels", help="compile the CPU kernels now, not when they are first used")
    kernels.set_defaults(run=_kernels)
    found = parser.parse_args(arguments)
    return found.run(found)


if __name__ == "__main__":
    sys.exit(main())
