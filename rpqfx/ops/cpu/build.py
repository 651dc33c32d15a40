"""Compiles the CPU kernels on first use, keeps them, and checks them once.

The library is built by the machine's own C++ compiler against the installed torch, for the vector instructions that
torch itself uses, and lies in a cache under a name made of all of these. A machine without a compiler, or one whose
kernels do not pass the check, runs the plain operators instead, and a warning says so once.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch

from rpqfx.errors import RPQError
from rpqfx.ops import check
from rpqfx.ops.cpu import cache, compiler, kernels
from rpqfx.ops.cpu.compiler import COMMAND

SWITCH = "RPQFX_KERNELS"  # "0" in the environment: never compile, never load

_LOG = logging.getLogger("rpqfx")
# Threads whose first use is the same moment: one compiles, the others wait. A child that is forked meanwhile must not.
_first_use = threading.Lock()


def _forked() -> None:
    global _first_use
    _first_use = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _NotMeant(RPQError):
    """Raised where kernels are left unused on purpose, or because the system cannot have them: nothing to warn of."""


@functools.cache
def ready() -> bool:
    """Returns whether the kernels are compiled, loaded and checked; the first call does all that."""
    with _first_use:
        return reason() is None


@functools.cache
def reason() -> str | None:
    """Returns why the kernels are not used, or None where they are; called by ``ready``, one thread at a time."""
    try:
        library = compiled()
        torch.ops.load_library(library)
        kernels.register()
        _check(library)
    except (RPQError, OSError, RuntimeError) as error:
        _LOG.info("CPU kernels are not used, plain operators run instead: %s", error)
        if not isinstance(error, _NotMeant):
            warnings.warn(
                f"rpqfx's CPU kernels are not used, torch's own operators run instead, which is slower: {error}. "
                f"{COMMAND} tries again and says more; {SWITCH}=0 in the environment does without, and without this "
                "warning",
                RuntimeWarning,
                stacklevel=2,
            )
        return str(error)
    return None


def compiled() -> Path:
    """Returns the library's file, compiled now if it is not there.

    Raises:
        RPQError: If it cannot be compiled, or should not be.
    """
    if os.environ.get(SWITCH) == "0":
        raise _NotMeant(f"{SWITCH}=0 in the environment")
    if sys.platform != "linux":
        raise _NotMeant(f"they are built on Linux only, this is {sys.platform}")
    tools = compiler.found()
    name = f"kernels-{_key(tools)}.so"
    places = cache.folders()
    for folder in places:
        if cache.intact(folder / name):
            return folder / name
    refused: list[str] = []
    for folder in places:
        try:
            return _compile(tools, cache.made(folder) / name)
        except OSError as error:
            refused.append(f"{folder} ({error.strerror or error})")
    raise RPQError(f"they cannot be kept in {', nor in '.join(refused)}; set {cache.VARIABLE} to a folder of yours")


def _compile(tools: compiler.Compiler, library: Path) -> Path:
    longest = (len(compiler.UNITS) + 1) * compiler.LONGEST  # one after the other, and the linker
    with cache.turn(library.with_suffix(".lock"), longest):
        if cache.intact(library):  # another process has had its turn
            return library
        print(
            "rpqfx: compiling its CPU kernels for this machine, up to a minute, once; they are kept in "
            f"{library.parent}. {COMMAND} does it beforehand.",
            file=sys.stderr,
            flush=True,
        )
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            compiler.build(tools, built)
            compiler.check_standard_library(tools, built)
            library.with_suffix(".checked").unlink(missing_ok=True)
            cache.seal(built, library)
        _LOG.info("compiled CPU kernels into %s in %.0f s", library, time.perf_counter() - start)
    return library


def _check(library: Path) -> None:
    """Checks the kernels, once where that can be noted."""
    checked = library.with_suffix(".checked")
    if checked.exists():
        return
    check.against_reference(kernels, torch.device("cpu"))
    try:
        checked.touch()
    except OSError as error:
        _LOG.info("the next process checks the kernels again: %s", error)


def _key(tools: compiler.Compiler) -> str:
    """Returns a name for all that the library depends on."""
    folder = Path(__file__).parent
    parts = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".h", ".cpp")]
    parts.append("\0".join([torch.__version__, tools.name, *tools.flags, *tools.libraries]).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
