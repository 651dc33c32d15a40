"""Running the compiler: several processes at a time, none of which is left behind."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rpqfx.errors import RPQError
from rpqfx.ops.cpu import build, compiler

FAILS = ["sh", "-c", "echo noise >&2; echo 'a.h:1: error: first' >&2; echo 'a.h:2: error: second' >&2; exit 3"]


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of cores that this process may use."""

    def have(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))

    return have


class Watched:
    """A command that starts a process of its own, as compilers do, and whether either still runs.

    Both hold one end of a pipe, which is at its end when nobody holds it any more.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "held"
        os.mkfifo(path)
        self._read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.started = folder / "started"
        self.command = ["sh", "-c", f"exec 3>{path}; sleep 300 & touch {self.started}; wait"]
        self.wait = f"until test -e {self.started}; do sleep 0.01; done"

    def is_gone(self) -> bool:
        assert self.started.exists(), "it never ran"
        return bool(select.select([self._read], [], [], 30)[0]) and os.read(self._read, 1) == b""


# --------------------------------------------------------------------------------------------- several at a time


def test_commands_run_at_the_same_time(cores: Callable[[int], None], tmp_path: Path) -> None:
    """Each ends only when all of them have begun."""
    cores(3)
    names = "abc"
    wait = "".join(f"until test -e {name}; do sleep 0.01; done; " for name in names)
    compiler.run([["sh", "-c", f"cd {tmp_path}; touch {name}; {wait}"] for name in names], tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_there_are_as_many_processes_as_cores(count: int, cores: Callable[[int], None], tmp_path: Path) -> None:
    """Four commands note how many run while they do."""
    cores(count)
    (tmp_path / "runs").mkdir()
    note = "touch runs/$0; ls runs | wc -l >> seen; sleep 0.2; rm runs/$0"
    compiler.run([["sh", "-c", f"cd {tmp_path}; {note}", name] for name in "abcd"], tmp_path)
    seen = [int(line) for line in (tmp_path / "seen").read_text().split()]
    assert len(seen) == 4 and max(seen) == count


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
def test_the_first_errors_of_either_are_in_the_message(
    place: int, count: int, cores: Callable[[int], None], tmp_path: Path
) -> None:
    cores(count)
    commands = [["true"]]
    commands.insert(place, FAILS)
    with pytest.raises(RPQError, match=r"^sh failed: a.h:1: error: first \| a.h:2: error: second$"):
        compiler.run(commands, tmp_path)


@pytest.mark.parametrize("place", [0, 1])
def test_a_failure_ends_the_others(place: int, cores: Callable[[int], None], tmp_path: Path) -> None:
    """With what they started: the compiler proper is a child of the command that is called a compiler."""
    cores(2)
    other = Watched(tmp_path)
    commands = [other.command]
    commands.insert(place, [*FAILS[:2], f"{other.wait}; {FAILS[2]}"])
    with pytest.raises(RPQError, match=r"^sh failed: a\.h:1"):
        compiler.run(commands, tmp_path)
    assert other.is_gone()


def test_one_that_cannot_be_started_ends_the_others(cores: Callable[[int], None], tmp_path: Path) -> None:
    cores(2)
    other = Watched(tmp_path)
    waited = ["sh", "-c", other.wait]
    with pytest.raises(RPQError, match=r"no C\+\+ compiler could be run .*no-such-program.*set CXX"):
        compiler.run([other.command, waited, ["no-such-program"]], tmp_path)
    assert other.is_gone()


def test_an_interrupt_ends_all(cores: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, pause = Watched(tmp_path), time.sleep

    def interrupted(seconds: float) -> None:
        pause(seconds)
        if other.started.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(compiler.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiler.run([other.command], tmp_path)
    assert other.is_gone()


@pytest.mark.parametrize("place", [0, 1])
def test_one_that_takes_too_long_is_named_so_and_ends_all(
    place: int, cores: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(2)
    monkeypatch.setattr(compiler, "LONGEST", 0.5)
    other = Watched(tmp_path)
    commands = [other.command]
    commands.insert(place, ["true"])
    with pytest.raises(RPQError, match=f"sh was stopped after 0 s; {compiler.COMMAND} beforehand"):
        compiler.run(commands, tmp_path)
    assert other.is_gone()


def test_each_has_all_the_time_from_its_own_start(
    cores: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other they take longer than one of them may."""
    cores(1)
    monkeypatch.setattr(compiler, "LONGEST", 1.4)
    compiler.run([["sleep", "0.5"]] * 3, tmp_path)


def test_more_errors_than_a_pipe_holds(tmp_path: Path) -> None:
    say = "echo 'error: a long line of a template, and its arguments' >&2"
    many = f"i=0; while test $i -lt 4000; do {say}; i=$((i+1)); done"
    with pytest.raises(RPQError, match="sh failed: error: a long line"):
        compiler.run([["sh", "-c", f"{many}; exit 1"]], tmp_path)


# ------------------------------------------------------------------------------------------------- the library


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two translation units that share a header, without torch."""
    (tmp_path / "shared.h").write_text("inline int shared() { static int count = 0; return ++count; }\n")
    text = '#include "shared.h"\nextern "C" __attribute__((visibility("default"))) int {}() {{ return shared(); }}\n'
    for name in ("one", "two"):
        (tmp_path / f"{name}.cpp").write_text(text.format(name))
    monkeypatch.setattr(compiler, "UNITS", (tmp_path / "one.cpp", tmp_path / "two.cpp"))
    return tmp_path


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
TOOLS = compiler.Compiler("c++", ("-fPIC", "-fvisibility=hidden"))


@needs_compiler
def test_all_units_are_linked_to_one_library(units: Path) -> None:
    """What both define in a header is there once."""
    compiler.build(TOOLS, units / "library.so")
    library = ctypes.CDLL(str(units / "library.so"))
    assert [library.one(), library.two(), library.one()] == [1, 2, 3]


@needs_compiler
@pytest.mark.parametrize("name", ["one", "two"])
def test_a_unit_that_does_not_compile_is_named(name: str, units: Path) -> None:
    (units / f"{name}.cpp").write_text("int f() { return nowhere; }\n")
    with pytest.raises(RPQError, match=rf"c\+\+ failed: .*{name}.cpp:1:.*error: .*nowhere"):
        compiler.build(TOOLS, units / "library.so")
    assert not (units / "library.so").exists()


@needs_compiler
def test_units_that_do_not_go_together_fail(units: Path) -> None:
    (units / "two.cpp").write_text((units / "one.cpp").read_text())
    with pytest.raises(RPQError, match=r"c\+\+ failed: .*multiple definition of `one'"):
        compiler.build(TOOLS, units / "library.so")


@needs_compiler
@pytest.mark.skipif(not compiler.standard_library(), reason="torch has no libstdc++ here")
@pytest.mark.parametrize("told", [True, False])
def test_a_compiler_with_a_library_of_its_own(told: bool, units: Path) -> None:
    """It takes that of the process when it is told of it; where it does not all the same, it is refused."""
    wrapper = units / "own-c++"
    wrapper.write_text('#!/bin/sh\nexec c++ -static-libstdc++ "$@"\n')
    wrapper.chmod(0o755)
    text = "#include <sstream>\nstd::string {}(long x) {{ std::ostringstream s; s << x; return s.str(); }}\n"
    for name in ("one", "two"):
        (units / f"{name}.cpp").write_text(text.format(name))
    libraries = tuple(compiler.standard_library()) if told else ()
    tools, library = compiler.Compiler(str(wrapper), TOOLS.flags, libraries), units / "library.so"
    compiler.build(tools, library)
    if told:
        compiler.check_standard_library(tools, library)
    else:
        with pytest.raises(RPQError, match=r"own-c\+\+ links a C\+\+ library of its own .* set CXX"):
            compiler.check_standard_library(tools, library)


@pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
def test_every_unit_registers_its_operators() -> None:
    sources = {unit.name: unit.read_text() for unit in compiler.UNITS}
    assert sorted(sources) == ["caches.cpp", "weights.cpp"]
    for name in ("weights.cpp: contract", "weights.cpp: tiled", "caches.cpp: nearest", "caches.cpp: rotated_scores"):
        unit, operator = name.split(": ")
        assert f'"{operator}(' in sources[unit] and hasattr(torch.ops.rpqfx_cpu, operator)


# ------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("capability", "flags"),
    [
        ("DEFAULT", []),
        ("AVX2", ["-mavx2", "-mfma", "-mf16c"]),
        ("AVX512", ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]),
    ],
)
def test_the_compiler_is_told_the_instructions_that_torch_uses(
    capability: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set of them is kept under another name; torch obeys ATEN_CPU_CAPABILITY, and so do the kernels."""
    here = build._key(compiler.found())
    own = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    told = compiler.found()
    assert told.libraries[: len(compiler.standard_library())] == tuple(compiler.standard_library())
    assert [part for part in told.flags if part.startswith("-m")] == flags
    assert {f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"} <= set(told.flags)
    assert (build._key(told) == here) == (capability == own)
