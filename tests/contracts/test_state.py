"""Nothing that a call does stays in a global: what the package keeps for the whole process is listed here, with why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rpqfx

PACKAGE = Path(rpqfx.__file__).parent

KEPT = {
    # Filled while the package is imported, only read afterwards.
    "nn/tensor/virtual.py: SERVED": "which function serves a torch call; filled by nn/tensor/served.py",
    "kv/calibration_files.py: _OPENERS": "what opens saved calibrations; filled by storage/kv_calibration.py",
    "nn/hosting/host.py: _LAYERS": "which layer stands for which class; filled by register_layer",
    "nn/hosting/host.py: _ADAPTERS": "what classes of torch.nn need besides; filled by register_adapter",
    # Found once for a class or the machine; two threads that ask at once find the same.
    "nn/hosting/host.py: _FOREIGN": "the class made for another: equal modules are of one class (dict.setdefault)",
    "kv/wrap.py: _MADE": "the same of attention on codes",
    "graph/bytecode.py: _KNOWN": "what the code of a class says, gone with the class",
    "kv/attention/rotary_conventions.py: _of_class": "how a class turns its keys by angles",
    "ops/cpu/kernels.py: register": "that compilers were told of the kernels",
    "ops/cpu/build.py: ready": "whether the kernels are built",
    "ops/cpu/build.py: reason": "why they are not",
    "ops/cuda/kernels.py: _installed": "whether Triton is there",
    "ops/cuda/kernels.py: _right": "whether a device's kernels are right",
    "ops/cuda/kernels.py: _capability": "of a device",
    # Of a backward pass, by its number, which torch makes unique; gone with the pass.
    "kv/quantizer/ema_steps.py: _TASKS": "the steps that a pass takes at its end",
    # What threads need of each other.
    "graph/tracer.py: ONE_AT_A_TIME": "a lock: torch's tracers keep their state in globals",
    "ops/cpu/build.py: _first_use": "a lock: one thread compiles",
    "ops/cpu/build.py: global _first_use": "a child that was forked meanwhile gets a lock of its own",
    "nn/tensor/views.py: TRACING": "a context variable, each thread's own",
    "nn/tensor/virtual.py: INITIALISING": "a context variable, each thread's own",
}

_MUTABLE = {
    "dict", "list", "set", "defaultdict", "Counter", "deque", "WeakKeyDictionary", "WeakValueDictionary", "local",
    "ContextVar", "Lock", "RLock", "Semaphore",
}  # fmt: skip
_CACHES = {"cache", "lru_cache"}
_CHANGES = {"append", "extend", "add", "update", "setdefault", "pop", "clear", "insert", "remove", "discard", "popitem"}


def _name(node: ast.expr | None) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _assigned(node: ast.stmt) -> tuple[str, ast.expr | None]:
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return (target.id if isinstance(target, ast.Name) else ""), value


def state(tree: ast.Module) -> Iterator[str]:
    """Names of a module that keep something for the process, and statements that reach out of their function.

    A table (a dict, list or set displayed at the top) counts if a function of its module changes it.
    """
    tables = set()
    for node in tree.body:
        name, value = _assigned(node)
        if _name(value) in _MUTABLE and isinstance(value, ast.Call):
            yield name
        elif isinstance(value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)):
            if isinstance(value, (ast.Dict, ast.List)) and not ast.unparse(value).strip("{}[]"):
                yield name  # empty, to be filled
            tables.add(name)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any(_name(decorator) in _CACHES for decorator in function.decorator_list):
                yield function.name
            for node in ast.walk(function):
                yield from _changed(node, tables)


def _changed(node: ast.AST, tables: set[str]) -> Iterator[str]:
    """What outlives a function that this part of its code changes."""
    if isinstance(node, ast.Global):
        yield from (f"global {name}" for name in node.names)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = _name(node.func.value)
        if node.func.attr in _CHANGES and owner in tables:
            yield owner
    elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        owner = _name(node.value)
        if owner in tables or (isinstance(node, ast.Attribute) and owner[:1].isupper()):  # an attribute of a class
            yield owner


def test_what_is_kept_for_the_process_is_listed() -> None:
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in state(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found - KEPT.keys() == set(), "state of a call belongs in arguments, or in an object that lives as long"
    assert KEPT.keys() - found == set(), "no longer kept: take it off the list"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("_SEEN = {}", "_SEEN"),
        ("_seen: dict[int, int] = {}", "_seen"),
        ("SEEN = weakref.WeakKeyDictionary()", "SEEN"),
        ("KNOWN = {1: 2}\ndef f():\n    KNOWN[3] = 4", "KNOWN"),
        ("KNOWN = [1]\ndef f():\n    KNOWN.append(4)", "KNOWN"),
        ("busy = False\ndef f():\n    global busy\n    busy = True", "global busy"),
        ("@functools.cache\ndef f(): pass", "f"),
        ("@functools.lru_cache(maxsize=None)\ndef f(): pass", "f"),
        ("class Weight: pass\ndef f():\n    Weight.tracing = True", "Weight"),
    ],
)
def test_state_is_found(code: str, name: str) -> None:
    assert list(state(ast.parse(code))) == [name]


@pytest.mark.parametrize(
    "code", ["KNOWN = {1: 2}\ndef f(): return KNOWN[1]", "NAMES = ('a',)", "def f():\n    x = {}\n    x[1] = 2"]
)
def test_tables_that_are_only_read_are_not_state(code: str) -> None:
    assert list(state(ast.parse(code))) == []
