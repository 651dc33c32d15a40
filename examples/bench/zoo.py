"""Rewrites a zoo of models and checks each: what `docs/zoo.md` shows is made by this file.

    python examples/bench/zoo.py                            # every model of the libraries that are installed
    python examples/bench/zoo.py 'timm/*' 'torch/lstm*'     # some of them
    python examples/bench/zoo.py --failed                   # once more those that failed or did not end
    python examples/bench/zoo.py --write docs/zoo.md        # the page, from the results

Each model runs in a process of its own, under a time limit. Results lie in a folder, one JSON file a model; a model
that has one is not run again unless ``--again`` or ``--failed`` says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from zoo_checks import CHECKS, check_model
from zoo_models import LIBRARIES, Model, catalogue
from zoo_page import page, summary

_MODULES = {"torch": "torch", "timm": "timm", "torchvision": "torchvision", "transformers": "transformers"}
_MODULES |= {"vit-pytorch": "vit_pytorch"}
_PRELOADED = {
    "timm": ("timm",),
    "torchvision": ("torchvision",),
    "transformers": ("transformers.modeling_utils", "transformers.masking_utils", "transformers.models.auto"),
    "vit-pytorch": ("vit_pytorch",),
}


def main() -> None:
    options = _options()
    results = Path(options.results)
    if options.write:
        Path(options.write).write_text(page(_stored(results), options.remarks), encoding="utf-8")
        return
    libraries = [name for name in LIBRARIES if importlib.util.find_spec(_MODULES[name])]
    chosen = [m for m in catalogue(libraries) if any(fnmatch.fnmatch(m.id, p) for p in options.models)]
    if options.list:
        print("\n".join(f"{m.id:<50} {m.architecture}" for m in chosen))
        print(f"{len(chosen)} models of {len({m.architecture for m in chosen})} architectures")
        return
    results.mkdir(parents=True, exist_ok=True)
    waiting = [m for m in chosen if options.again or _wanted(_read(_file(results, m)), options.failed)]
    print(f"{len(waiting)} of {len(chosen)} models to run")
    failed = _run_all(waiting, results, options)
    print("\n".join(summary(_stored(results), {m.id for m in chosen})))
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rewrites a zoo of models and checks each.")
    parser.add_argument("models", nargs="*", default=["*"], help="patterns of ids, such as 'timm/resnet*'")
    parser.add_argument("--results", default="zoo-results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=240, help="seconds for one model")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile, such as inductor")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=CHECKS, help="checks to leave out; earlier results of them stay"
    )
    parser.add_argument("--again", action="store_true", help="also models that have a result")
    parser.add_argument("--failed", action="store_true", help="also models whose result has a failure")
    parser.add_argument("--list", action="store_true", help="only list the models")
    parser.add_argument("--write", metavar="PAGE", help="write the Markdown page from the results, and run nothing")
    parser.add_argument("--remarks", help="Markdown to put into the page")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------ processes


def _run_all(waiting: list[Model], results: Path, options: argparse.Namespace) -> int:
    """Runs models, some at a time; returns how many failed."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    queue, running, done, failed, loaded = list(waiting), {}, 0, 0, set()
    while queue or running:
        while queue and len(running) < options.workers:
            entry = queue.pop(0)
            for module in _PRELOADED.get(entry.library, ()) if entry.library not in loaded else ():
                importlib.import_module(module)  # once here rather than in each process
            loaded.add(entry.library)
            process = context.Process(target=_child, args=(entry.id, results, tuple(options.skip), options.backend))
            process.start()
            running[process] = (entry, time.monotonic())
        time.sleep(0.05)
        for process, (entry, begun) in list(running.items()):
            late = time.monotonic() - begun > options.limit
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[process]
            result = _finish(_file(results, entry), entry, process.exitcode, time.monotonic() - begun, late)
            done, failed = done + 1, failed + (not _passed(result))
            print(f"[{done}/{len(waiting)}] {entry.id:<48} {_line(result)}", flush=True)
    return failed


def _child(name: str, results: Path, skip: tuple[str, ...], backend: str) -> None:
    """One model, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    library = name.partition("/")[0]
    entry = next(m for m in catalogue([library]) if m.id == name)
    file = _file(results, entry)
    kept = {k: v for k, v in ((_read(file) or {}).get("checks") or {}).items() if k in skip}  # of an earlier run
    log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def told(result: dict[str, Any]) -> None:
        draft = file.with_suffix(".part")
        whole = {**result, "checks": {**result["checks"], **kept}, "versions": versions(library)}
        draft.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        draft.replace(file)

    file.unlink(missing_ok=True)
    check_model(entry, skip=skip, backend=backend, told=told)


def versions(library: str) -> dict[str, str]:
    """Of what a result depends on."""
    found = {"python": sys.version.split()[0]}
    for name in {"torch", "rpqfx", library} - {"rpqfx"}:
        found[name] = importlib.metadata.version(name)
    return found


def _finish(file: Path, entry: Model, code: int | None, seconds: float, late: bool) -> dict[str, Any]:
    result = _read(file) or {"id": entry.id, "library": entry.library, "architecture": entry.architecture, "checks": {}}
    result["seconds"] = seconds
    if late or code:
        log = file.with_suffix(".log")
        said = log.read_text(encoding="utf-8", errors="replace")[-3000:] if log.exists() else ""
        last = (said.strip().splitlines() or [""])[-1]
        why = f"took longer than {seconds:.0f} s" if late else f"ended with code {code}: {last}"
        result["checks"]["process"] = {"state": "failed", "detail": why, "trace": said}
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


# ---------------------------------------------------------------------------------------------------- the results


def _file(results: Path, entry: Model) -> Path:
    return results / f"{entry.id.replace('/', '__')}.json"


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _stored(results: Path) -> list[dict[str, Any]]:
    order = {m.id: i for i, m in enumerate(catalogue())}
    found = [json.loads(file.read_text(encoding="utf-8")) for file in results.glob("*.json")]
    return sorted((r for r in found if r["id"] in order), key=lambda r: order[r["id"]])


def _passed(result: dict[str, Any]) -> bool:
    return bool(result["checks"]) and all(check["state"] != "failed" for check in result["checks"].values())


def _wanted(result: dict[str, Any] | None, failed: bool) -> bool:
    return result is None or (failed and not _passed(result))


def _line(result: dict[str, Any]) -> str:
    bad = [f"{name}: {c['detail']}" for name, c in result["checks"].items() if c["state"] == "failed"]
    return f"{result['seconds']:5.1f} s  " + ("ok" if not bad else "FAILED " + " | ".join(bad)[:300])


if __name__ == "__main__":
    main()
