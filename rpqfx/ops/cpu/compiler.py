"""Runs the machine's C++ compiler: on the translation units side by side, and then on what it made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import torch

from rpqfx.errors import RPQError

COMMAND = "python -m rpqfx kernels"
LONGEST = 600.0  # seconds that the compiler gets for each unit, and the linker for the library
PAUSE = 0.05  # seconds between two looks at what runs

UNITS = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
_CAPABILITIES = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
_TELLING = ("error", "multiple definition", "undefined reference", "cannot find")  # the linker calls these no errors


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler and its flags.

    Attributes:
        name: The program.
        flags: Flags for each translation unit.
        libraries: Flags for linking.
    """

    name: str
    flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


def found() -> Compiler:
    """Returns the compiler of this machine, with flags for the installed torch and its vector instructions.

    Raises:
        RPQError: If torch's tools for that cannot be imported.
    """
    level = logging.getLogger("torch.utils.cpp_extension")
    before, level.level = level.level, logging.ERROR  # it warns of missing GPU tools, which are not needed here
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RPQError(f"torch's extension tools cannot be imported ({error})") from None
    finally:
        level.level = before
    capability = torch.backends.cpu.get_cpu_capability()
    # Loops are aligned: where a short one happens to lie is up to a tenth of what a kernel takes, and a change of one
    # kernel moves all others.
    flags = [
        "-std=c++20", "-O3", "-falign-loops=32", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-w", "-pipe",
        f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *_CAPABILITIES.get(capability, []),
    ]  # fmt: skip
    flags += [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    places = [item for path in cpp_extension.library_paths("cpu") for item in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = (*standard_library(), *places, "-ltorch_cpu", "-lc10")
    return Compiler(cpp_extension.get_cxx_compiler(), tuple(flags), libraries)


def standard_library() -> list[str]:
    """Returns the file of the C++ library that this process has loaded, where it has one.

    A compiler that links one of its own into what it builds would put a second one beside it. Then the message of an
    error is written to a stream of the one with parts of the other, which ends the process.
    """
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libstdc++.so" in line}
    return sorted(loaded)


def check_standard_library(compiler: Compiler, library: Path) -> None:
    """Raises RPQError where kernels would have a C++ library of their own beside the one of the process.

    Args:
        compiler: What built them.
        library: The file.
    """
    if standard_library() and b"libstdc++.so" not in library.read_bytes():
        raise RPQError(
            f"{compiler.name} links a C++ library of its own into what it builds, which does not go with the one that "
            "torch has loaded; set CXX to the system's compiler"
        )


def build(compiler: Compiler, library: Path) -> None:
    """Compiles all translation units, and links them to a shared library.

    Args:
        compiler: From ``found``.
        library: The file to write. Object files lie beside it.

    Raises:
        RPQError: As ``run`` does.
    """
    folder = library.parent
    objects = [folder / f"{unit.stem}.o" for unit in UNITS]
    units = zip(UNITS, objects, strict=True)
    run([[compiler.name, *compiler.flags, "-c", str(unit), "-o", str(made)] for unit, made in units], folder)
    linked = [compiler.name, "-shared", "-fopenmp", *map(str, objects), *compiler.libraries, "-o", str(library)]
    run([linked], folder)


def run(commands: Sequence[Sequence[str]], folder: Path) -> None:
    """Runs commands in parallel, each on a core of its own; where there are fewer cores, some wait.

    None of them runs any more when this returns or raises.

    Args:
        commands: The program of each, and its arguments.
        folder: For what they have to say.

    Raises:
        RPQError: If one cannot be started, fails, or takes more than ``LONGEST`` seconds.
    """
    waiting, running = list(commands), list[_Process]()
    cores = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < cores:
                errors = folder / f"{len(waiting)}.errors"
                running.append(stack.enter_context(_Process(waiting.pop(0), errors)))
            left = [process for process in running if not process.ended()]
            if len(left) == len(running):
                time.sleep(PAUSE)
            running = left


class _Process:
    """A command that runs, in a group with the processes that it starts itself: a compiler is several."""

    def __init__(self, command: Sequence[str], errors: Path) -> None:
        self._name, self._end, self._errors = command[0], time.monotonic() + LONGEST, errors
        with errors.open("wb") as said:  # not a pipe, which holds too little of what is said about a template
            self._running = self._start(command, said)

    @staticmethod
    def _start(command: Sequence[str], said: BinaryIO) -> subprocess.Popen[bytes]:
        nothing = subprocess.DEVNULL
        try:
            return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=said, process_group=0)
        except OSError as error:
            raise RPQError(f"no C++ compiler could be run ({error}); set CXX to one, or install g++") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._running.poll() is None:
            os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()

    def ended(self) -> bool:
        """Returns whether it has ended well; raises RPQError where it has not, or not in time."""
        code = self._running.poll()
        if code is None and time.monotonic() > self._end:
            raise RPQError(
                f"{self._name} was stopped after {LONGEST:.0f} s; {COMMAND} beforehand, while nothing else runs, may do"
            )
        if code:
            said = self._errors.read_text(errors="replace").splitlines()
            lines = [line for line in said if any(words in line for words in _TELLING)] or said
            raise RPQError(f"{self._name} failed: {' | '.join(lines[:3])}")
        return code is not None
