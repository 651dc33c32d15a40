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
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch

from rpqfx.errors import RPQError
from rpqfx.ops import check
from rpqfx.ops.cpu import cache, kernels

SWITCH = "RPQFX_KERNELS"  # "0" in the environment: never compile, never load
COMMAND = "python -m rpqfx.compile_kernels"
LONGEST = 600.0  # seconds that a compiler gets

_LOG = logging.getLogger("rpqfx")
_SOURCE = Path(__file__).with_name("kernels.cpp")
_CAPABILITIES = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
# Threads whose first use is the same moment: one compiles, the others wait. A child that is forked meanwhile must not.
_first_use = threading.Lock()


def _forked() -> None:
    global _first_use
    _first_use = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _NotMeant(RPQError):
    """Kernels are not used as was asked for, or as is known of the system: nothing to warn of."""


@functools.cache
def ready() -> bool:
    """Whether the kernels are compiled, loaded and checked; the first call does all that."""
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
    command = _command()
    name = f"kernels-{_key(command)}.so"
    places = cache.folders()
    for folder in places:
        if cache.intact(folder / name):
            return folder / name
    refused: list[str] = []
    for folder in places:
        try:
            return _compile(command, cache.made(folder) / name)
        except OSError as error:
            refused.append(f"{folder} ({error.strerror or error})")
    raise RPQError(f"they cannot be kept in {', nor in '.join(refused)}; set {cache.VARIABLE} to a folder of yours")


def _compile(command: list[str], library: Path) -> Path:
    with cache.turn(library.with_suffix(".lock"), 2 * LONGEST):
        if cache.intact(library):  # another process has had its turn
            return library
        print(
            "rpqfx: compiling its CPU kernels for this machine, about a minute, once; they are kept in "
            f"{library.parent}. {COMMAND} does it beforehand.",
            file=sys.stderr,
            flush=True,
        )
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            _run([*command, "-o", str(built)])
            check_standard_library(built)
            library.with_suffix(".checked").unlink(missing_ok=True)
            cache.seal(built, library)
        _LOG.info("compiled CPU kernels into %s in %.0f s", library, time.perf_counter() - start)
    return library


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LONGEST)
    except OSError as error:
        raise RPQError(f"no C++ compiler could be run ({error}); set CXX to one, or install g++") from None
    except subprocess.TimeoutExpired:
        raise RPQError(
            f"{command[0]} was stopped after {LONGEST:.0f} s; {COMMAND} beforehand, while nothing else runs, may do"
        ) from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise RPQError(f"{command[0]} failed: {' | '.join(lines[:3])}")


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


def _key(command: list[str]) -> str:
    """A name for all that the library depends on."""
    parts = [path.read_bytes() for path in sorted(_SOURCE.parent.glob("*.[hc]*")) if path.suffix in (".h", ".cpp")]
    parts.append("\0".join([torch.__version__, *command]).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _command() -> list[str]:
    """The compiler's command line, but for where the result goes."""
    level = logging.getLogger("torch.utils.cpp_extension")
    before, level.level = level.level, logging.ERROR  # it warns of missing GPU tools, which are not needed here
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RPQError(f"torch's extension tools cannot be imported ({error})") from None
    finally:
        level.level = before
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *_CAPABILITIES.get(capability, [])]
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    libraries = [item for path in cpp_extension.library_paths("cpu") for item in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return [
        cpp_extension.get_cxx_compiler(), "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-shared", "-fopenmp",
        "-w", *flags, *includes, str(_SOURCE), *standard_library(), *libraries, "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


def standard_library() -> list[str]:
    """Returns the file of the C++ library that this process has loaded, where it has one.

    A compiler that links its own into what it builds would put a second one beside it. Then an error's message is
    written to a stream of the one with facets of the other, which ends the process.
    """
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libstdc++.so" in line}
    return sorted(loaded)


def check_standard_library(library: Path) -> None:
    """Raises RPQError where a library has a C++ library of its own, and not that of the process."""
    if standard_library() and b"libstdc++.so" not in library.read_bytes():
        raise RPQError(
            "the compiler links a C++ library of its own into what it builds, which does not go with the one that "
            "torch has loaded; set CXX to the system's compiler"
        )
