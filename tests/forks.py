"""Runs Python code in a process that has torch and nothing of this library.

A process of one's own costs seconds, nearly all of them for importing torch. Here one process imports torch and einops
and nothing else, and what is asked for runs in forks of it. A fork is as fresh as a new process, except that what torch
reads from the environment when it is imported has been read.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_ROOT = Path(__file__).parents[1]
_IMPORTED = ("torch", "einops")


def run(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, anew: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs code as ``python -c`` does, in the root of the repository.

    Args:
        code: What runs, as ``__main__``.
        *arguments: Its ``sys.argv[1:]``.
        environment: All of its environment variables; that of this process if None.
        anew: A process of its own imports torch, for code that depends on what torch reads as it is imported.

    Returns:
        Its status and what it wrote; ``args`` are the arguments.
    """
    given = dict(os.environ if environment is None else environment)
    given["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [given.get("PYTHONPATH")])])
    if anew or not hasattr(os, "fork"):
        first = f"import {', '.join(_IMPORTED)}\n"
        return subprocess.run(
            [sys.executable, "-c", first + code, *arguments], env=given, cwd=_ROOT, capture_output=True, text=True
        )
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, "stdout"), Path(folder, "stderr")]
        status = _ask({"code": code, "arguments": arguments, "environment": given, "streams": [*map(str, streams)]})
        return subprocess.CompletedProcess(arguments, status, *[path.read_text() for path in streams])


def module(name: str) -> str:
    """Returns code that runs a module as ``python -m`` does."""
    return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


def _ask(job: dict[str, Any]) -> int:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks has ended"
    return int(answer)


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # it ends where its input does
    return server


# ------------------------------------------------------------------------------------------------ the other process


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(code: str, arguments: list[str], environment: dict[str, str], streams: list[str]) -> NoReturn:
    """Makes a fork what ``python -c`` with that code would be."""
    for descriptor, path in enumerate([os.devnull, *streams]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
        threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking all of torch apart takes a second


if __name__ == "__main__":
    _serve()
