"""What is checked of one model of the zoo.

The rewritten model is held against its *twin*: the dense model whose rewritten Parameters are set to the tensors that
the codebooks stand for. A check that fails never keeps the others from running.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_coverage import coverage
from zoo_models import Model
from zoo_pairs import Pair, differences, quantized_weights, wake
from zoo_runs import TOLERANCE, output_error, run, seed_all
from zoo_steps import train, train_twin

import rpqfx
from rpqfx.graph.copying import copy_model

CHECKS = ("eval", "train", "names", "deepcopy", "pickle", "save_load", "compile", "steps", "coverage")
Result = dict[str, Any]


class NotApplicable(Exception):
    """The dense model cannot do it either."""


class Failed(Exception):
    """The rewritten model differs from its twin."""


# ---------------------------------------------------------------------------------------------------- the checks


def _compare(
    pair: Pair, training: bool, make: Callable[[nn.Module], Callable[..., Any]] | None = None, backward: bool = True
) -> Result:
    """Outputs, gradients and buffers, in float32 and, where that is not enough, in float64."""
    said: Result = {}
    for dtype in (torch.float32, torch.float64):
        small, twin = pair.copies(dtype)
        options = {"training": training, "dtype": dtype, "backward": backward}
        wanted = run(pair.entry, twin, function=make and make(twin), **options)
        found = run(pair.entry, small, function=make and make(small), **options)
        error, where = differences(small, twin, found, wanted, dtype)
        name = str(dtype).removeprefix("torch.")
        said[name] = error
        if error <= TOLERANCE[dtype]:
            return {"precision": name, "error": error, "detail": ""}
        last = f"{where} differs by {error:.2g} in {name}"
    raise Failed(f"{last} (float32: {said['float32']:.2g})")


def _reproducible(pair: Pair, training: bool) -> None:
    """Raises where the twin itself does something else at each run."""
    runs = []
    for _ in range(2):
        _, twin = pair.copies(torch.float32)
        runs.append(run(pair.entry, twin, training=training))
    if output_error(runs[0].outputs, runs[1].outputs) > TOLERANCE[torch.float32]:
        raise NotApplicable("the dense model is not reproducible: two runs with one seed differ")


def check_eval(pair: Pair) -> Result:
    return _check_mode(pair, training=False)


def check_train(pair: Pair) -> Result:
    return _check_mode(pair, training=True)


def _check_mode(pair: Pair, training: bool) -> Result:
    try:
        return _compare(pair, training)
    except Exception:
        try:
            _reproducible(pair, training)
        except NotApplicable:
            raise
        except Exception as error:  # the dense model has no gradients in this mode, or cannot run at all
            return {**_forward_only(pair, training), "detail": f"outputs only: the dense model fails: {_line(error)}"}
        raise


def _forward_only(pair: Pair, training: bool) -> Result:
    _, twin = pair.copies(torch.float32)
    try:
        run(pair.entry, twin, training=training, backward=False)
    except Exception as error:
        raise NotApplicable(f"the dense model fails: {_line(error)}") from None
    return _compare(pair, training, backward=False)


def check_names(pair: Pair) -> Result:
    dense, small = pair.dense.state_dict(), pair.small.state_dict()
    gone = {name for name in dense if name not in small}
    if extra := gone - set(quantized_weights(pair.small)):
        raise Failed(f"{sorted(extra)[0]} is gone from the state dict")
    kept = [name for name in dense if name not in gone]
    if kept != [name for name in small if name in dense]:
        raise Failed("the order of the state dict's untouched tensors changed")
    for name in kept:
        a, b = dense[name], small[name]
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
            raise Failed(f"{name} changed")
    return {"detail": ""}


def _same_outputs(pair: Pair, other: nn.Module) -> Result:
    models = (other, copy_model(pair.small))
    found, wanted = (run(pair.entry, model, backward=False).outputs for model in models)
    error = output_error(found, wanted)
    if error > 1e-5:
        raise Failed(f"an output differs by {error:.2g}")
    return {"detail": "" if error == 0 else f"outputs within {error:.1g}", "error": error}


def check_deepcopy(pair: Pair) -> Result:
    try:
        copy.deepcopy(pair.twin)
    except Exception as error:
        raise NotApplicable(f"the dense model cannot be copied: {_line(error)}") from None
    return _same_outputs(pair, copy.deepcopy(pair.small))


def check_pickle(pair: Pair) -> Result:
    try:
        pickle.loads(pickle.dumps(pair.twin))
    except Exception as error:
        raise NotApplicable(f"the dense model cannot be pickled: {_line(error)}") from None
    return _same_outputs(pair, pickle.loads(pickle.dumps(pair.small)))


def check_save_load(pair: Pair) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.rpq"
        rpqfx.save(pair.small, path)
        seed_all(3)
        try:
            loaded, how = rpqfx.load(path, pair.entry.build), ""
            return _same_outputs(pair, loaded)
        except Exception as error:
            how = f"not built on meta: {_line(error)}"
        loaded = rpqfx.load(path, pair.entry.build, build_device="cpu")
    said = _same_outputs(pair, loaded)
    return {**said, "detail": "; ".join(filter(None, [said["detail"], how]))}


def check_compile(pair: Pair, backend: str = "aot_eager") -> Result:
    def compiled(model: nn.Module) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True, backend=backend, dynamic=False)

    _, twin = pair.copies(torch.float32)
    try:
        with _within(100):
            run(pair.entry, twin, function=compiled(twin))
    except Exception as error:
        raise NotApplicable(f"the dense model does not compile: {_line(error)}") from None
    finally:
        torch._dynamo.reset()
    return {**_compare(pair, False, compiled), "backend": backend}


def check_steps(pair: Pair, steps: int = 3) -> Result:
    worst: dict[str, float] = {}
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        small, twin = pair.copies(dtype)
        mine, theirs = train(pair.entry, small, dtype, steps), train_twin(pair.entry, small, twin, dtype, steps, pair)
        ours, dense = torch.tensor(mine).double(), torch.tensor(theirs).double()
        if not bool(dense.isfinite().all()):
            raise NotApplicable(f"the dense model's losses are not finite: {theirs}")
        worst[name] = float(((ours - dense).abs() / dense.abs().clamp(min=1e-12)).max())
        if worst[name] <= 1e-4:
            return {"precision": name, "error": worst[name], "losses": [mine, theirs], "detail": ""}
    again = train_twin(pair.entry, *pair.copies(torch.float64), torch.float64, steps, pair)
    if again != theirs:
        raise NotApplicable(f"the dense model is not reproducible: its losses were {theirs}, and then {again}")
    raise Failed(f"losses differ by {worst['float64']:.2g} in float64, {worst['float32']:.2g} in float32")


# -------------------------------------------------------------------------------------------------------- all of it


def check_model(
    entry: Model,
    *,
    skip: tuple[str, ...] = (),
    backend: str = "aot_eager",
    told: Callable[[Result], None] = lambda result: None,
    rewrite: Callable[[nn.Module], nn.Module] | None = None,
) -> Result:
    """Rewrites one model and checks it.

    Args:
        entry: The model.
        skip: Checks to leave out.
        backend: Of torch.compile.
        told: Called with what is known so far after each check.
        rewrite: Rewrites the dense model; ``rpqify`` with ``Policy.from_scratch()`` if left out.

    Returns:
        Plain values: for each check its state (``"ok"``, ``"failed"`` or ``"n/a"``), with details.
    """
    result: Result = {"id": entry.id, "library": entry.library, "architecture": entry.architecture, "checks": {}}
    seed_all(0)
    start = time.perf_counter()
    dense = wake(entry.build().float())
    result["parameters"] = sum(p.numel() for p in dense.parameters())
    result["build_s"] = time.perf_counter() - start
    start = time.perf_counter()
    try:
        seed_all(0)
        small = rewrite(dense) if rewrite else rpqfx.rpqify(dense, rpqfx.Policy.from_scratch())
        result["rewrite_s"] = time.perf_counter() - start
        pair = Pair(entry, dense, small)
    except Exception as error:
        result["checks"]["rewrite"] = _failure("failed", error)
        result["checks"]["coverage"] = coverage(dense, None, set())
        told(result)
        return result
    result["checks"]["rewrite"] = {"state": "ok", "detail": ""}
    checks: dict[str, Callable[[Pair], Result]] = {
        "eval": check_eval, "train": check_train, "names": check_names, "deepcopy": check_deepcopy,
        "pickle": check_pickle, "save_load": check_save_load, "steps": check_steps, "coverage": _check_coverage,
        "compile": lambda pair: check_compile(pair, backend),
    }  # fmt: skip
    for name, check in checks.items():
        if name not in skip:
            result["checks"][name] = {"state": "failed", "detail": "it did not end"}
            told(result)
            begun = time.perf_counter()
            result["checks"][name] = {**_outcome(check, pair), "seconds": time.perf_counter() - begun}
            told(result)
    return result


def _check_coverage(pair: Pair) -> Result:
    return coverage(pair.dense, pair.small, set(quantized_weights(pair.small)))


def _outcome(check: Callable[[Pair], Result], pair: Pair) -> Result:
    try:
        with _within(150):
            return {"state": "ok", **check(pair)}
    except NotApplicable as reason:
        return {"state": "n/a", "detail": str(reason)}
    except Failed as reason:
        return {"state": "failed", "detail": str(reason)}
    except Exception as error:
        return _failure("failed", error)


def _failure(state: str, error: Exception) -> Result:
    trace = "".join(traceback.format_exception(error))[-4000:]
    return {"state": state, "detail": _line(error), "trace": trace}


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after so long, where the system has an alarm and nothing else uses it."""
    if not hasattr(signal, "SIGALRM") or signal.getsignal(signal.SIGALRM) not in (signal.SIG_DFL, _expired):
        yield
        return
    before, left = signal.signal(signal.SIGALRM, _expired), signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(left)
        signal.signal(signal.SIGALRM, before)


def _expired(number: int, frame: Any) -> None:
    raise TimeoutError("it took too long")
