"""Measured figures as JSON, with the machine, the versions and the seeds they came from.

A benchmark calls ``write``; the files lie in ``examples/results`` and are committed. ``pages.py`` makes the tables of
the documentation from them, so that no figure is typed by hand.
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent.parent / "results"
_PACKAGES = ("torch", "einops", "numpy", "hypothesis", "safetensors", "transformers", "peft", "accelerate")


def machine() -> dict[str, Any]:
    """Returns what a figure depends on besides the code: processor, instruction set, threads, versions."""
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def write(name: str, command: str, figures: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Writes the figures of one run.

    Args:
        name: The file's name without its ending; may have folders.
        command: What to type to measure them again, from the root of the repository.
        figures: Plain values; seeds belong among them.
        folder: Where results lie.

    Returns:
        The file.
    """
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "machine": machine(), **figures}, indent=2) + "\n", "utf-8")
    return path


def read(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Reads what ``write`` wrote under a name."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text("utf-8"))
    return found


def where(found: dict[str, Any]) -> str:
    """Says on which machine, and by which command, figures were measured.

    Args:
        found: What ``read`` gave.
    """
    said = found["machine"]
    processor = f"{said['processor']} ({said['capability']}), {said['threads']} threads"
    return f"Measured on {processor}, torch {said['versions']['torch']}: `{found['command']}`."


def read_all(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Reads every result in a folder of results, sorted by file name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted((folder / name).glob("*.json"))]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
