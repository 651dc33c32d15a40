"""Importing the library loads nothing that torch and einops do not, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forks

# Runs in a fresh interpreter: what does importing {module} load beyond torch and einops, and what does it change?
SCRIPT = """
import os, random, sys, warnings
import torch, einops
warnings.simplefilter("error")
sys.path[:0] = {paths}

def state():
    return (
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
        str(torch.get_default_device()), torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled(),
        torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), list(warnings.filters), dict(os.environ), sys.path[:],
    )

before, modules = state(), set(sys.modules)
import {module}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - modules}}
print("top", *sorted(loaded))
print("torch", *sorted(name for name in set(sys.modules) - modules if name.startswith("torch.")))
print("same" if state() == before else "changed")
"""
HEAVY = {
    "transformers", "safetensors", "triton", "torchvision", "matplotlib", "pandas", "scipy", "sympy", "networkx",
    "jinja2", "hypothesis", "pytest", "sqlite3", "multiprocessing", "asyncio", "http", "ssl",
}  # fmt: skip
HEAVY_TORCH = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.testing", "torch.utils.tensorboard")


def import_alone(module: str, *paths: Path) -> dict[str, list[str]]:
    """What the script printed, by first word."""
    done = forks.run(SCRIPT.format(module=module, paths=[*map(str, paths)]))
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"importing {module} wrote: {done.stderr}"
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines][:2] == ["top", "torch"], f"importing {module} printed: {done.stdout}"
    return {line[0]: line[1:] for line in lines}


def assert_light(module: str, *paths: Path) -> None:
    found = import_alone(module, *paths)
    heavy = HEAVY & set(found["top"])
    heavy |= {name for name in found["torch"] if name.startswith(HEAVY_TORCH)}
    assert not heavy, f"importing {module} loads {sorted(heavy)}"
    assert "same" in found, f"importing {module} changes torch, the environment or random states"


def test_importing_is_light_and_changes_nothing() -> None:
    """No optional package, no compiler, no warning, no print; threads, dtypes and random states stay."""
    assert_light("rpqfx, rpqfx.nn, rpqfx.fit, rpqfx.ops, rpqfx.routing")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sqlite3", "loads .*sqlite3"),
        ("import torch._dynamo", "loads .*torch._dynamo"),
        ("import torch; torch.set_num_threads(1 + torch.get_num_threads())", "changes torch"),
        ("import torch; torch.rand(1)", "changes torch"),
        ("import torch; torch.set_default_dtype(torch.float64)", "changes torch"),
        ("import os; os.environ['SOME_FLAG'] = '1'", "changes torch"),
        ("import warnings; warnings.warn('look', UserWarning)", "UserWarning: look"),
        ("import sys; print('hello', file=sys.stderr)", "wrote: hello"),
        ("print('hello')", "printed: hello"),
    ],
    ids=[
        "package",
        "compiler",
        "threads",
        "random state",
        "default dtype",
        "environment",
        "warning",
        "stderr",
        "print",
    ],
)
def test_the_check_notices(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "costly_module.py").write_text(body + "\n")
    with pytest.raises(AssertionError, match=message):
        assert_light("costly_module", tmp_path)


def test_importing_reads_no_environment_variable() -> None:
    """What torch reads for itself is read before."""
    script = """
import os, sys, torch, einops

class Noted(dict):
    def __getitem__(self, name):
        read.append(name)
        return super().__getitem__(name)

read = []
os.environ._data = Noted(os.environ._data)
import rpqfx, rpqfx.nn, rpqfx.routing
print(read)
os.environ.get("HOME")
print(len(read))
"""
    done = forks.run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "1"], done.stdout
