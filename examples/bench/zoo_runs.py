"""Running a model forward and backward in a way that can be repeated, and comparing two such runs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from zoo_models import Call, Model

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
# Of the largest gradient of a model: a gradient that is zero but for rounding is no larger.
NOISE = {torch.float32: 1e-5, torch.float64: 1e-11}


@dataclass
class Run:
    """What one forward and backward left.

    Args:
        outputs: Every floating tensor that forward returned.
        inputs: Gradients of the floating inputs.
        buffers: The model's buffers afterwards.
    """

    outputs: list[Tensor]
    inputs: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


class _Double(TorchFunctionMode):
    """Where a model asks for float32 it gets float64, so that rounding cannot hide what is compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Makes tensors of this dtype where none is asked for, and float64 also where float32 is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Double() if dtype == torch.float64 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def seed_all(seed: int) -> None:
    """Seeds every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(seed)


def arguments(model: Model, training: bool, dtype: torch.dtype = torch.float32) -> Call:
    """The same arguments at each call; floating ones take gradients where the entry says so."""
    seed_all(0)
    call = ((training and model.train_call) or model.call)()

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(model.grad_inputs)

    return Call(*tree_map(leaf, (call.args, call.kwargs or {})))


def floating(values: Any) -> list[Tensor]:
    """Every floating tensor in a structure; complex ones as real ones."""
    found = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    found = [torch.view_as_real(x) if x.is_complex() else x for x in found]
    return [x for x in found if x.is_floating_point()]


def run(
    entry: Model,
    model: nn.Module,
    *,
    training: bool = False,
    dtype: torch.dtype = torch.float32,
    function: Callable[..., Any] | None = None,
    backward: bool = True,
) -> Run:
    """One forward and backward of a random linear function of all outputs.

    Args:
        entry: How the model is called.
        model: The model; its gradients are those of this run afterwards.
        training: In train mode.
        dtype: Of the arguments, and of what the model makes.
        function: Called in place of the model, such as a compiled one.
        backward: Whether gradients are taken.
    """
    model.train(training)
    model.zero_grad(set_to_none=True)
    call = arguments(entry, training, dtype)
    seed_all(1)
    with precision(dtype), torch.set_grad_enabled(backward):
        result = (model if function is None else function)(*call.args, **call.kwargs or {})
        outputs = floating(entry.pick(result) if entry.pick else result)
        total = torch.zeros((), dtype=torch.float64)
        generator = torch.Generator().manual_seed(5)
        for output in outputs:
            cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            if output.requires_grad:
                finite = torch.where(output.isfinite(), output, 0.0)  # a mask's -inf has no gradient
                total = total + (finite.double() * cotangent).sum()
        if total.requires_grad:
            total.backward()
    leaves = [x for x in floating((call.args, call.kwargs)) if x.requires_grad]
    return Run(
        [output.detach() for output in outputs],
        {f"input {i}": None if x.grad is None else x.grad for i, x in enumerate(leaves)},
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
    )


# --------------------------------------------------------------------------------------------------- comparing


def output_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of any output, over the largest element of that output."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return float("inf")
    largest = max((_largest(x) for x in wanted), default=0.0)
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        difference = torch.where(b.isfinite(), a - b, 0.0)
        worst = max(worst, _largest(difference) / max(_largest(b), 1e-6 * largest, 1e-30))
    return worst


def gradient_error(
    found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], dtype: torch.dtype
) -> tuple[float, str]:
    """The largest ``|g - g'| / |g|`` of any tensor, and its name; what is only rounding does not count."""
    norms = {name: 0.0 if g is None else float(_dense(g).double().norm()) for name, g in wanted.items()}
    floor = NOISE[dtype] * max(norms.values(), default=0.0) + 1e-30
    worst, where = 0.0, ""
    for name, norm in norms.items():
        a, b = (x.get(name) for x in (found, wanted))
        if a is None and b is None:
            continue
        a = torch.zeros_like(_dense(b)) if a is None else _dense(a)  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else _dense(b)
        difference = float((a.double() - b.double()).norm())
        error = difference / max(norm, floor / TOLERANCE[dtype])
        if not error <= worst:  # NaN counts as the worst
            worst, where = (error if error == error else float("inf")), name
    return worst, where


def buffer_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a floating buffer, over the largest element of it, and its name.

    A batch's mean may be zero but for rounding; it counts by a thousandth of its module's largest buffer at least.
    """
    largest: dict[str, float] = {}
    for name, b in wanted.items():
        owner = name.rpartition(".")[0]
        largest[owner] = max(largest.get(owner, 0.0), _largest(b) if b.is_floating_point() else 0.0)
    worst, where = 0.0, ""
    for name, b in wanted.items():
        if name in found and b.is_floating_point():
            a, scale = found[name], max(_largest(b), 1e-3 * largest[name.rpartition(".")[0]], 1e-30)
            same = a.shape == b.shape and torch.equal(a.isfinite(), b.isfinite())
            error = _largest(a.double() - b.double()) / scale if same else float("inf")
            if error > worst:
                worst, where = error, f"the buffer {name}"
    return worst, where


def _dense(x: Tensor) -> Tensor:
    return x.detach().to_dense() if x.is_sparse else x.detach()


def _largest(x: Tensor) -> float:
    x = x.detach().double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0
