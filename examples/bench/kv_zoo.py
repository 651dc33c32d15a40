"""Puts the caches of every causal and encoder-decoder architecture of transformers into codes, and checks each.

    python examples/bench/kv_zoo.py                        # all that the installed transformers has
    python examples/bench/kv_zoo.py 'gemma*' t5            # some of them
    python examples/bench/kv_zoo.py --failed               # once more those that are not served
    python examples/bench/kv_zoo.py --write                # examples/results/kv-zoo.json, from the results

Each has a tiny random model in a process of its own, under a time limit. Results lie in a folder, one JSON file an
architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import results
import torch
from kv_zoo_checks import check
from kv_zoo_models import Architecture, architectures

_PRELOADED = ("transformers.modeling_utils", "transformers.masking_utils", "transformers.generation",
              "transformers.models.auto.modeling_auto")  # fmt: skip
COMMAND = "python examples/bench/kv_zoo.py && python examples/bench/kv_zoo.py --write"


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="of architectures, such as 'gemma*'")
    parser.add_argument("--results", default="kv-zoo-results", help="folder of the results")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one architecture")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--failed", action="store_true", help="also those that are not served")
    parser.add_argument("--write", action="store_true", help="write the file of figures, and run nothing")
    options = parser.parse_args()
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    if options.write:
        known = [one.id for one in architectures()]
        rows = [row for file in folder.glob("*.json") if (row := _read(file))["id"] in known]
        results.write("kv-zoo", COMMAND, {"rows": sorted(rows, key=lambda row: row["id"])})
        return
    for module in _PRELOADED:
        importlib.import_module(module)  # once here rather than in each process
    for one in architectures():
        file = folder / f"{one.id.replace(' ', '_')}.json"
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns for name in (one.id, one.kind))
        if not wanted or (file.exists() and not options.again and not (options.failed and _failed(_read(file)))):
            continue
        row = _run(one, file, options.limit)
        print(f"{row['id']:<36} {row['seconds']:5.1f} s  {row['state']:<8} {row['detail'][:200]}", flush=True)


def _run(one: Architecture, file: Path, limit: int) -> dict[str, Any]:
    """Checks one architecture in a process of its own."""
    file.unlink(missing_ok=True)
    process, begun = multiprocessing.get_context("fork").Process(target=_child, args=(one, file)), time.monotonic()
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    row: dict[str, Any] = {"id": one.id, "state": "unknown", "detail": "the time limit", "checks": {}}
    row = {**row, **(_read(file) if file.exists() else {}), "form": one.form}
    row["seconds"] = round(time.monotonic() - begun, 1)
    file.write_text(json.dumps(row, indent=1), "utf-8")
    return row


def _child(one: Architecture, file: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        try:
            row = check(one)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            told = f"{type(error).__name__}: {error} ({where})"
            row = {"id": one.id, "state": "unknown", "detail": told[-400:], "checks": {}}
    file.write_text(json.dumps(row), "utf-8")


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def _failed(row: dict[str, Any]) -> bool:
    return row["state"] != "served"


if __name__ == "__main__":
    sys.exit(main())
