"""Measuring which way each quantized weight runs faster, and pinning it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.nn.hosting.backed import SUFFIX
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import refuse_sharded, unwrapped
from rpqfx.ops import Plan
from rpqfx.policies.arguments import check_model, example_call
from rpqfx.reporting.tables import Table, to_text
from rpqfx.timing import clock
from rpqfx.timing.record import Trial, Use, observe
from rpqfx.validation.values import flag, whole

_HEAD = ("weight", "shape", "rows", "dequantize ms", "lookup ms", "plan")
_SHOWN = 3


@dataclass(frozen=True)
class TimedUse:
    """One product of a model with a weight, and its time under each plan.

    Args:
        use: The product, with the shape, dtype and device of its input.
        count: How often one call of the model runs it.
        dequantize: Milliseconds of one, with the weight dequantized for it.
        lookup: Milliseconds of one, through the table of dot products; as ``dequantize`` where there is no other way.
    """

    use: Use
    count: int
    dequantize: float
    lookup: float


@dataclass(frozen=True)
class TunedWeight:
    """The measurements of `tune` for one weight.

    Args:
        name: Qualified name of the Parameter.
        names: All its names, where it is tied.
        shape: Of the dense tensor.
        before: Its plan before.
        plan: Its plan now.
        uses: What was measured; empty where the call did not reach the weight with any product.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    before: Plan
    plan: Plan
    uses: tuple[TimedUse, ...] = ()

    @property
    def dequantize(self) -> float:
        """Milliseconds of all its uses in one call, with the weight dequantized."""
        return sum(timed.count * timed.dequantize for timed in self.uses)

    @property
    def lookup(self) -> float:
        """Milliseconds of all its uses in one call, through the table of dot products."""
        return sum(timed.count * timed.lookup for timed in self.uses)


@dataclass(frozen=True)
class Tuning:
    """The measurements and pinned plans of `tune`; ``str`` is a table.

    Args:
        weights: Every quantized weight, in the model's order.
        backward: Whether times include the gradients.
    """

    weights: tuple[TunedWeight, ...]
    backward: bool = False

    @property
    def reached(self) -> tuple[TunedWeight, ...]:
        """Weights that were measured and pinned."""
        return tuple(weight for weight in self.weights if weight.uses)

    @property
    def unreached(self) -> tuple[TunedWeight, ...]:
        """Weights that the call used in no product; they keep their plan. Embeddings are among them: they look up."""
        return tuple(weight for weight in self.weights if not weight.uses)

    def __str__(self) -> str:
        found = self.reached
        dequantize, lookup = sum(w.dequantize for w in found), sum(w.lookup for w in found)
        pinned = sum(w.lookup if w.plan == "lookup" else w.dequantize for w in found)
        passes = "forward and backward" if self.backward else "forward"
        totals = [
            f"{len(found)} of {len(self.weights)} weights pinned",
            f"all products of one call, {passes}: "
            f"{dequantize:.3f} ms dequantized, {lookup:.3f} ms by lookup, {pinned:.3f} ms as pinned",
        ]
        return to_text(Table(_HEAD, [_row(weight) for weight in self.weights], totals))


def tune(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    backward: bool = False,
    repeats: int = 9,
) -> Tuning:
    """Measures in which way each quantized weight runs faster, and sets its plan, in place.

    Runs a copy of the model once, in the mode it is in, to see which products each weight is used in: by layers, and by
    modules that use a Parameter of their own. Each distinct product is then timed both ways on random inputs of the
    same shape, dtype and device, under the same autocast; weights of equal shape and use are timed once. A weight's
    [`plan`][rpqfx.nn.RPQWeight.plan] becomes the one that takes less for all its uses in the call. Weights that the
    call does not reach keep theirs.

    Nothing else of the model changes: buffers, gradients, modes, caches and random states stay as they are. On an
    exception no plan has changed. What is pinned holds for this machine, these shapes and this number of threads;
    call it again where they change, or set ``plan`` to ``"auto"`` to be rid of it.

    Args:
        model: A model with quantized weights. Compiled parts of it are measured uncompiled, and what stands around
            it (``DataParallel``, ...) is looked through.
        example_inputs: Positional inputs of one call, or the one tensor that it takes; of the size that is going to be
            used.
        example_kwargs: Keyword inputs of that call.
        backward: Whether to time the gradients too, for training.
        repeats: How often each product is timed each way, in turns; the median counts.

    Returns:
        Times and plans, weight by weight; print it for a table.

    Raises:
        InputError: If ``model`` has no quantized weight or is on the meta device, the inputs are no sequence or are
            rejected by it, or ``repeats`` is no positive number.
        RewriteError: If the model cannot be copied, or is sharded.
    """
    check_model(model, "tune")
    flag("backward", backward, error=InputError)
    whole("repeats", repeats, 1, error=InputError)
    refuse_sharded(model, "tune")
    written = unwrapped(model)
    held = _held(written)
    args, kwargs = example_call(written, example_inputs, example_kwargs)
    times: dict[_Asked, list[float]] = {}
    with torch.inference_mode(False):  # under which there are no gradients to time
        seen = observe(written, args, kwargs, backward)
        found = [_measure(weight, paths, seen[paths[0]], times, repeats) for weight, paths in held]
    for (weight, _), tuned in zip(held, found, strict=True):
        weight.plan = tuned.plan
    return Tuning(tuple(found), backward)


class _Asked(NamedTuple):
    """Returns the key of a measurement: weights and uses with equal keys take equally long."""

    held: tuple[Any, ...]
    use: Use


def _measure(
    weight: RPQWeight, paths: Sequence[str], uses: Counter[Use], times: dict[_Asked, list[float]], repeats: int
) -> TunedWeight:
    trained = tuple(parameter.requires_grad for parameter in weight.parameters())
    timed = []
    for use, count in uses.items():
        asked = _Asked((weight.spec, weight.layout, weight.codebooks.dtype, trained), use)
        if asked not in times:
            trials = [Trial(weight, use, plan) for plan in use.choice(weight)]
            times[asked] = clock.in_turns(trials, use.device, repeats)
        timed.append(TimedUse(use, count, times[asked][0], times[asked][-1]))
    names = tuple(_name(weight, path) for path in paths)
    kept = TunedWeight(names[0], names, weight.layout.shape, weight.plan, weight.plan, tuple(timed))
    if not timed:
        return kept
    plan: Plan = "lookup" if kept.lookup < kept.dequantize else "dequantize"
    return TunedWeight(kept.name, kept.names, kept.shape, kept.before, plan, kept.uses)


def _held(model: nn.Module) -> list[tuple[RPQWeight, list[str]]]:
    """Every quantized weight with all its paths."""
    found: dict[RPQWeight, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RPQWeight):
            found.setdefault(module, []).append(path)
    if not found:
        raise InputError("no weight of this model is quantized, so there is nothing to tune; pass what rpqify returned")
    for weight, paths in found.items():
        if weight.codebooks.is_meta:
            raise InputError(
                f"{_name(weight, paths[0])} is on the meta device, where nothing runs; call rpqfx.materialize first"
            )
    return list(found.items())


def _name(weight: RPQWeight, path: str) -> str:
    """Returns the name of the Parameter that a weight stands for; of one that is the model itself, its class."""
    return path.removesuffix(SUFFIX) or type(weight).__name__


def _row(weight: TunedWeight) -> tuple[str, ...]:
    name = weight.name if len(weight.names) == 1 else f"{weight.name} (= {', '.join(weight.names[1:])})"
    shape = " x ".join(str(size) for size in weight.shape)
    if not weight.uses:
        return (name, shape, "-", "-", "-", f"{weight.plan} (not reached)")
    counts: Counter[int] = Counter()
    for timed in weight.uses:
        counts[timed.use.rows] += timed.count
    rows = [str(rows) if count == 1 else f"{count} x {rows}" for rows, count in counts.items()]
    rows = rows if len(rows) <= _SHOWN else [*rows[:_SHOWN], "..."]
    return (name, shape, ", ".join(rows), f"{weight.dequantize:.3f}", f"{weight.lookup:.3f}", weight.plan)
