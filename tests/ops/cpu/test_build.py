"""Compiling on first use: the cache, the check, and a stated reason wherever the kernels are not used."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rpqfx import nn
from rpqfx.errors import RPQError
from rpqfx.ops import check
from rpqfx.ops.cpu import build, cache, compiler, kernels
from tests import forks

needs_kernels = pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
TRY = (
    "import logging; logging.basicConfig(level=logging.INFO)\n"
    "import torch\n"
    "from rpqfx.nn import RPQLinear\n"
    "from rpqfx.ops.cpu import build\n"
    "layer = RPQLinear(32, 64, codebook_dim=16, codebook_bits=4)\n"
    "for _ in range(3): y = layer(torch.ones(2, 32))\n"
    "assert torch.allclose(y, torch.nn.functional.linear(torch.ones(2, 32), layer.weight, layer.bias), atol=1e-5)\n"
    "print('ready', build.ready())\n"
)


LIBRARY = b"a library that names libstdc++.so.6"


def attempt(anew: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that runs a layer, with all that it logs."""
    inherited = {name: value for name, value in os.environ.items() if name != build.SWITCH}
    done = forks.run(TRY, environment={**inherited, **environment}, anew=anew)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own; what is not compiled yet is compiled at once, into a few bytes."""
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "found", lambda: compiler.Compiler("compiler", ("-x",)))
    monkeypatch.setattr(compiler, "build", lambda tools, library: library.write_bytes(LIBRARY))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("environment", "reason", "warned"),
    [
        ({"RPQFX_KERNELS": "0"}, "RPQFX_KERNELS=0", 0),
        ({"CXX": "no-such-compiler"}, "no C++ compiler could be run", 1),
        ({"CXX": "false"}, "false failed", 1),
    ],
)
def test_without_kernels_plain_operators_run_and_a_warning_says_why_once(
    environment: dict[str, str], reason: str, warned: int, tmp_path: Path
) -> None:
    """None where they were turned off; the log has the reason in every case."""
    done = attempt(RPQFX_CACHE=str(tmp_path), **environment)
    assert done.stdout.split() == ["ready", "False"]
    logged = [line for line in done.stderr.splitlines() if line.startswith("INFO:rpqfx") and "not used" in line]
    assert len(logged) == 1 and reason in logged[0]
    lines = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(lines) == warned and all(reason in line and build.COMMAND in line for line in lines)


def test_a_cache_that_cannot_be_written_is_a_reason(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(RPQError, match=f"cannot be kept in .*cache.*set {cache.VARIABLE}"):
        build.compiled()


# ------------------------------------------------------------------------------------------------- what is said


def test_compiling_is_announced_once_before_it_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    run = compiler.build
    monkeypatch.setattr(compiler, "build", lambda *args: said.append(capfd.readouterr().err) or run(*args))
    library = build.compiled()
    assert len(said) == 1 and said[0].count("\n") == 1
    for part in ("compiling", "a minute", "once", str(folder), build.COMMAND):
        assert part in said[0]
    assert build.compiled() == library and library.read_bytes() == LIBRARY
    assert capfd.readouterr() == ("", "") and len(said) == 1


def test_nothing_is_said_where_kernels_are_turned_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "RPQFX_KERNELS=0" in str(build.reason.__wrapped__())
    assert capfd.readouterr() == ("", "") and not folder.exists()


@needs_kernels
def test_the_command_says_where_the_kernels_are() -> None:
    assert build.COMMAND == "python -m rpqfx kernels"
    code = f"import sys; sys.argv[1:] = ['kernels']; {forks.module('rpqfx')}"
    done = forks.run(code)
    assert done.returncode == 0 and "ready" in done.stdout and str(build.compiled()) in done.stdout
    done = forks.run(code, environment={**os.environ, build.SWITCH: "0"})
    assert done.returncode == 1 and "RPQFX_KERNELS=0" in done.stderr and "Warning" not in done.stderr


# ------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("damage", ["cut", "changed", "no sum", "empty"])
def test_a_damaged_library_is_made_anew(damage: str, folder: Path) -> None:
    library = build.compiled()
    library.with_suffix(".checked").touch()
    whole = library.read_bytes()
    if damage == "no sum":
        library.with_suffix(".sha256").unlink()
    else:
        library.write_bytes({"cut": whole[:4], "changed": whole[:-1] + b"Y", "empty": b""}[damage])
    assert not cache.intact(library)
    assert build.compiled() == library and library.read_bytes() == whole and cache.intact(library)
    assert not library.with_suffix(".checked").exists()


@needs_kernels
def test_half_a_library_does_not_end_the_process(tmp_path: Path) -> None:
    """Loading it would; here it cannot be made anew either, and plain operators run."""
    library = build.compiled()
    for path in (library, library.with_suffix(".sha256"), library.with_suffix(".checked")):
        shutil.copy(path, tmp_path)
    (tmp_path / library.name).write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    done = attempt(RPQFX_CACHE=str(tmp_path), PATH="/nowhere", CXX="c++")
    assert done.stdout.split() == ["ready", "False"] and "no C++ compiler" in done.stderr


@pytest.fixture
def home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is that of a user, whose home is here."""
    for name in (cache.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "home"


def test_the_cache_is_in_the_home_of_the_user(home: Path) -> None:
    assert build.compiled().parent == home / ".cache" / "rpqfx"


@pytest.mark.parametrize("trouble", ["no home", "not writable", "another user's", "open to all"])
def test_another_folder_serves_where_the_home_does_not(
    trouble: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = home / ".cache" / "rpqfx"
    if trouble == "no home":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif trouble == "not writable":
        home.write_text("")
    else:
        build.compiled()  # a library is there, which nobody should load
        own.chmod(0o777)
        if trouble == "another user's":
            own.chmod(0o755)
            monkeypatch.setattr(cache, "trusted", lambda path: own not in (path, path.parent))
    library = build.compiled()
    assert library.parent == tmp_path / f"rpqfx-{os.geteuid()}"
    assert library.parent.stat().st_mode & 0o77 == 0
    assert build.compiled() == library


def test_who_owns_a_file_and_who_may_write_to_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.compiled()
    assert cache.trusted(library)
    link = library.with_name("link")
    link.symlink_to(library)
    assert cache.trusted(link)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cache.trusted(library) == (me == 0)  # root's is everybody's
    monkeypatch.setattr(os, "geteuid", lambda: me)
    library.chmod(0o777)
    assert not cache.trusted(library)
    monkeypatch.setenv(cache.VARIABLE, str(library.parent))
    assert cache.trusted(library)


def test_a_cache_that_is_complete_need_not_be_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the image of a container: nothing is made there, no lock and no folder."""
    library = build.compiled()
    before = sorted(folder.iterdir())
    monkeypatch.setattr(cache, "made", lambda folder: pytest.fail("it was written to"))
    assert build.compiled() == library and sorted(folder.iterdir()) == before
    monkeypatch.setattr(check, "against_reference", lambda *args: None)
    monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError("read-only")))
    build._check(library)


# ------------------------------------------------------------------------- several processes, several threads

HOLD = (
    "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); time.sleep(60)"
)


def test_processes_take_turns_and_a_dead_one_holds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.compiled()
    lock = library.with_suffix(".lock")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RPQError, match="another process"), cache.turn(lock, 0.2):
            pass
        assert build.compiled() == library  # what is there needs no turn
        library.unlink()
        found: list[Path] = []
        waiting = threading.Thread(target=lambda: found.append(build.compiled()))
        waiting.start()
        time.sleep(0.3)
        assert not found and not library.exists()
        other.send_signal(signal.SIGKILL)
        waiting.join(30)
    assert found == [library] and library.exists()
    with open(lock) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and it has been given back


def test_who_waited_finds_what_the_other_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    run = compiler.build
    monkeypatch.setattr(compiler, "build", lambda *args: (runs.append(""), time.sleep(0.3), run(*args)))
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(build.compiled())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made) == 4 and len(runs) == 1


EIGHT = """
import threading, torch
from rpqfx.nn import RPQLinear
from rpqfx.ops.cpu import build
calls, load = [], torch.ops.load_library
torch.ops.load_library = lambda path: calls.append(path) or load(path)
torch.set_num_threads(1)
layer, x = RPQLinear(64, 256, codebook_dim=16, codebook_bits=4), torch.randn(8, 3, 64)
start, found = threading.Barrier(8), [None] * 8
def run(i):
    start.wait()
    found[i] = [layer(x[i]).detach() for _ in range(20)]
threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
assert all(torch.equal(y, layer(x[i]).detach()) for i in range(8) for y in found[i])
print(len(calls), build.ready())
"""


@needs_kernels
def test_eight_threads_whose_first_use_is_the_same_moment_load_once() -> None:
    done = forks.run(EIGHT)
    assert done.stdout.split() == ["1", "True"], done.stderr


FORKED = """
import multiprocessing, torch
from rpqfx.nn import RPQLinear
torch.set_num_threads(2)
layer, x = RPQLinear(256, 1024, codebook_dim=64, codebook_bits=6), torch.randn(40, 256)
layer(x).sum().backward()
with torch.no_grad():
    want = layer(x)
def run(queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(layer(x).numpy())
context = multiprocessing.get_context("fork")
queue = context.Queue()
workers = [context.Process(target=run, args=(queue,), daemon=True) for _ in range(2)]
[worker.start() for worker in workers]
found = [torch.from_numpy(queue.get(timeout=60)) for _ in workers]
[worker.join(60) for worker in workers]
print([torch.allclose(y, want, atol=1e-5) for y in found])
"""


@needs_kernels
@pytest.mark.slow
def test_a_forked_worker_does_not_hang() -> None:
    """After threads of the parent have run the kernels. On one thread, as a DataLoader's workers are.

    On several, any product of torch hangs too: the threads of OpenMP are not there after a fork.
    """
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[True, True]", done.stderr


# ------------------------------------------------------------------------------------------------- the machine


@needs_kernels
def test_a_compiled_library_is_found_again_without_a_compiler() -> None:
    """The second process neither compiles nor checks."""
    done = attempt(PATH="/nowhere", CXX="c++")
    assert done.stdout.split() == ["ready", "True"]
    assert "compil" not in done.stderr


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_fewer_vector_instructions_will_do(capability: str, tmp_path: Path) -> None:
    """What torch takes for older machines (it obeys this variable) compiles, and passes the same check."""
    done = attempt(anew=True, RPQFX_CACHE=str(tmp_path), ATEN_CPU_CAPABILITY=capability)
    assert done.stdout.split() == ["ready", "True"]
    assert len(list(tmp_path.glob("*.checked"))) == len(list(tmp_path.glob("*.so"))) == 1
    assert done.stderr.count("rpqfx: compiling") == 1


@needs_kernels
def test_kernels_that_are_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A result that is off by a little more than rounding fails the check, which is made before the first use."""
    library = tmp_path / build.compiled().name
    monkeypatch.setattr(build, "compiled", lambda: library)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    right = kernels.contract_grads
    monkeypatch.setattr(kernels, "contract_grads", lambda *args: (right(*args)[0], right(*args)[1] * 1.001))
    with caplog.at_level(logging.INFO, "rpqfx"), pytest.warns(RuntimeWarning, match="accumulate is wrong"):
        assert build.reason.__wrapped__() is not None
    assert "accumulate is wrong" in caplog.text
    assert not list(tmp_path.iterdir())  # and it is checked again next time
    monkeypatch.setattr(kernels, "contract_grads", right)
    assert build.reason.__wrapped__() is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".checked"]


@needs_kernels
@pytest.mark.parametrize(
    "place",
    [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")],
    ids=lambda place: type(place).__name__,
)
def test_the_check_passes_wherever_the_first_use_is(place: Any) -> None:
    with place:
        check.against_reference(kernels, torch.device("cpu"))


@needs_kernels
@pytest.mark.parametrize(
    "name",
    [
        "contract",
        "contract_grads",
        "expand",
        "lookup",
        "collect",
        "gather_sum",
        "bin_sum",
        "nearest",
        "beam_search",
        "slot_tables",
        "slot_sums",
        "pick_sum",
        "bin_masses",
        "rotated_scores",
    ],
)
def test_the_check_looks_at_every_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)

    def wrong(*args: object) -> object:
        result = right(*args)
        if result is None:  # it is in the last argument
            return args[-1].mul_(1.2)  # type: ignore[attr-defined]
        return tuple(x * 1.2 for x in result) if isinstance(result, tuple) else result * 1.2

    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(RPQError, match="wrong"):
        check.against_reference(kernels, torch.device("cpu"))


@needs_kernels
def test_layers_run_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, both plans."""
    called = set()
    for name in ("contract", "contract_grads", "expand", "collect"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, run=run, **k: called.add(n) or run(*a, **k))
    layer = nn.RPQLinear(64, 512, codebook_dim=32, codebook_bits=4)
    x = torch.ones(8, 64, requires_grad=True)
    layer(x).sum().backward()
    assert called == {"contract", "contract_grads"}
    layer.weight.sum().backward()
    assert called == {"contract", "contract_grads", "expand", "collect"}
