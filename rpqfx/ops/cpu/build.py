"""Compiles the CPU kernels on first use, keeps them, and checks them once.

The library is built by the machine's own C++ compiler against the installed torch, for the vector instructions that
torch itself found, and lies in a cache under a name made of all of these. A machine without a compiler, or one whose
kernels do not pass the check, runs the plain operators instead; either way the log (``rpqfx``, level INFO) says so.
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
from pathlib import Path

import torch

from rpqfx.errors import RPQError
from rpqfx.ops import check
from rpqfx.ops.cpu import kernels

SWITCH = "RPQFX_KERNELS"  # "0" in the environment: never compile, never load
CACHE = "RPQFX_CACHE"  # in the environment: where compiled kernels are kept

_LOG = logging.getLogger("rpqfx")
_SOURCE = Path(__file__).with_name("kernels.cpp")
_BUILDING = threading.Lock()
_CAPABILITIES = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


@functools.cache
def ready() -> bool:
    """Whether the kernels are compiled, loaded and checked; the first call does all that."""
    try:
        if os.environ.get(SWITCH) == "0":
            raise RPQError(f"{SWITCH}=0 in the environment")
        with _BUILDING:  # other threads find it built
            library = _compiled()
        torch.ops.load_library(library)
        checked = library.with_suffix(".checked")
        if not checked.exists():
            check.against_reference(kernels, torch.device("cpu"))
            checked.touch()
    except (RPQError, OSError, RuntimeError) as reason:
        _LOG.info("CPU kernels are not used, plain operators run instead: %s", reason)
        return False
    return True


def _compiled() -> Path:
    """The library's file, compiled now if it is not there."""
    if sys.platform != "linux":
        raise RPQError(f"they are built on Linux only, this is {sys.platform}")
    command = _command()
    parts = [path.read_bytes() for path in sorted(_SOURCE.parent.glob("*.[hc]*")) if path.suffix in (".h", ".cpp")]
    parts.append("\0".join([torch.__version__, *command]).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    library = _cache() / f"kernels-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    _LOG.info("compiling CPU kernels into %s (once, some seconds)", library)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # another process may be at it as well
        built = Path(folder) / library.name
        try:
            result = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as reason:
            raise RPQError(f"no C++ compiler could be run ({reason}); set CXX to one, or install g++") from None
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise RPQError(f"{command[0]} failed: {' | '.join(lines[:3])}")
        os.replace(built, library)
    _LOG.info("compiled CPU kernels in %.0f s", time.perf_counter() - start)
    return library


def _command() -> list[str]:
    """The compiler's command line, but for where the result goes."""
    level = logging.getLogger("torch.utils.cpp_extension")
    before, level.level = level.level, logging.ERROR  # it warns of missing GPU tools, which are not needed here
    try:
        from torch.utils import cpp_extension
    except ImportError as reason:
        raise RPQError(f"torch's extension tools cannot be imported ({reason})") from None
    finally:
        level.level = before
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *_CAPABILITIES.get(capability, [])]
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    libraries = [item for path in cpp_extension.library_paths("cpu") for item in (f"-L{path}", f"-Wl,-rpath,{path}")]
    return [
        cpp_extension.get_cxx_compiler(), "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-shared", "-fopenmp",
        "-w", *flags, *includes, str(_SOURCE), *libraries, "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


def _cache() -> Path:
    folder = os.environ.get(CACHE)
    if folder is not None:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpqfx"
