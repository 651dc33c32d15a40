"""Runs what was exported in a process that has torch and not this library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_SCRIPT = """
import sys
sys.modules["rpqfx"] = None  # importing it now fails, installed or not
import torch

folder, how, library, *paths = sys.argv[1:]
if library:
    torch.ops.load_library(library)
results = []
for path, calls in zip(paths, torch.load(f"{folder}/calls"), strict=True):
    if how == "export":
        model = torch.export.load(path).module()
        names = []
    else:
        model = torch._inductor.aoti_load_package(path)
        names = model.get_constant_fqns()
    with torch.no_grad():
        results.append((names, [model(*call) for call in calls]))
torch.save(results, f"{folder}/results")
"""


def run_without_rpqfx(
    how: str, calls: dict[str, list[tuple[Any, ...]]], folder: Path, library: Path | None = None
) -> list[tuple[list[str], Any]]:
    """Loads programs and calls them.

    Args:
        how: ``"export"`` for what torch.export.save wrote, ``"aoti"`` for packages of AOTInductor.
        calls: For the path of each program, the arguments of its calls.
        folder: Where files go.
        library: Of compiled kernels, which is loaded first.

    Returns:
        For each program the names of its constants (of packages only) and the results of its calls.
    """
    torch.save(list(calls.values()), folder / "calls")
    command = [sys.executable, "-c", _SCRIPT, str(folder), how, str(library or ""), *calls]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")
