"""Records the products of a model with its quantized weights, and runs the same again with random numbers."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpqfx.errors import RewriteError
from rpqfx.graph.copying import copy_model
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.weight_slice import Part
from rpqfx.ops import Plan
from rpqfx.ops.conv_contract import ConvContract

Product = Literal["linear", "linear_t", "conv"]


@dataclass(frozen=True)
class Use:
    """One product with a weight: all that its time depends on, but for the weight and the numbers.

    Args:
        product: The method of [`RPQWeight`][rpqfx.nn.RPQWeight] that was called.
        shape: Of the input.
        stride: Of the input in memory, which a product may have to put in order first.
        dtype: Of the input.
        device: Of the input.
        autocast: The dtype that autocast computes in there, or None where it is off.
        gradients: Whether autograd recorded the product.
        input_gradient: Whether the input takes a gradient.
        arguments: Of ``conv`` its geometry.
        path: How the part in use was taken of the weight (see ``rpqfx.nn.weight_slice.Part``); empty for all of it.
    """

    product: Product
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    gradients: bool
    input_gradient: bool
    arguments: tuple[Any, ...] = ()
    path: tuple[Any, ...] = ()

    @classmethod
    def of(cls, product: Product, x: Tensor, arguments: tuple[Any, ...] = (), path: tuple[Any, ...] = ()) -> Use:
        """The use that a call with input ``x`` is, under the autocast and the grad mode of this moment."""
        kind, gradients = x.device.type, torch.is_grad_enabled()
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(
            product, tuple(x.shape), tuple(x.stride()), x.dtype, x.device, autocast, gradients,
            gradients and x.requires_grad, arguments, path,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of the batch; of a convolution, places of its input."""
        features = self.shape[-1 - (len(self.arguments[0]) if self.product == "conv" else 0)]
        return math.prod(self.shape) // max(1, features)

    def choice(self, weight: RPQWeight) -> tuple[Plan, ...]:
        """The plans that differ; some convolutions cannot look up, and are dequantized whatever the plan."""
        if self.product == "conv":
            groups = self.arguments[3]
            if not ConvContract.fits(weight.spec.codebook_dim, weight.layout.shape, groups):
                return ("dequantize",)
        return ("dequantize", "lookup")

    def input(self) -> Tensor:
        """A random input like the one there was. No global random state is used."""
        like = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        numbers = torch.Generator(self.device).manual_seed(0)
        x = torch.empty_like(like, device=self.device).normal_(generator=numbers)
        return x.requires_grad_(self.input_gradient)

    def ask(self, weight: RPQWeight, x: Tensor) -> Tensor:
        """The product of a weight with an input like the one there was."""
        part = weight.whole()
        for step, *arguments in self.path:
            if step == "take":  # some experts: as many as there were
                ids = torch.arange(arguments[0], device=x.device) % part.layout.shape[0]
                part = part.take(ids)
            else:
                part = getattr(part, step)(*arguments)
        if self.product == "conv":
            return part.conv(x, None, *self.arguments)
        return part.linear_t(x) if self.product == "linear_t" else part.linear(x)


class Trial:
    """A use of a weight under a plan, on one random input: each call runs it anew, gradients included.

    Neither the weight nor the gradients of its Parameters are touched, and no hook of theirs runs.

    Args:
        weight: The weight.
        use: The product to time.
        plan: Which way it runs.
    """

    def __init__(self, weight: RPQWeight, use: Use, plan: Plan) -> None:
        self.use, self.plan = use, plan
        self._weight = _stand_in(weight, plan)
        self._x = use.input()
        self._wanted = [t for t in (self._x, *self._weight.parameters()) if t.requires_grad] if use.gradients else []
        self._cotangent = torch.ones_like(self._product()) if self._wanted else None

    def __call__(self) -> None:
        """Runs it once."""
        y = self._product()
        if self._wanted:
            torch.autograd.grad(y, self._wanted, self._cotangent)

    def _product(self) -> Tensor:
        autocast = self.use.autocast
        with (
            torch.autocast(self.use.device.type, autocast, enabled=autocast is not None),
            torch.set_grad_enabled(bool(self._wanted)),
        ):
            return self.use.ask(self._weight, self._x)


def _stand_in(weight: RPQWeight, plan: Plan) -> RPQWeight:
    """A weight with the same numbers, in the same memory, and Parameters of its own."""
    twin = copy.copy(weight)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach(), p.requires_grad) for name, p in weight._parameters.items()
    }
    twin.plan = plan
    return twin


def observe(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], gradients: bool
) -> dict[str, Counter[Use]]:
    """Runs a copy of a model once and notes what it asks of each quantized weight.

    Args:
        model: The model; it, its gradients and torch's and Python's random states stay as they are.
        args: Positional inputs.
        kwargs: Keyword inputs.
        gradients: Whether autograd records the run.

    Returns:
        For each weight's first qualified name, how often each use occurs, in the order of the run.

    Raises:
        RewriteError: If the model cannot be copied.
    """
    try:
        trial = copy_model(model)
    except RewriteError as error:
        raise RewriteError(
            f"tune runs a copy of the model, so that nothing of it changes, and this one cannot be copied "
            f"({error.__cause__}); set the plan of its weights by hand"
        ) from error
    noted = {}
    for name, weight in trial.named_modules():
        if isinstance(weight, RPQWeight):
            weight.__class__ = type("Noting", (_Noting, type(weight)), {})
            noted[name] = weight.__dict__["uses"] = Counter[Use]()
    with _random_states_kept(model), _eagerly(), torch.set_grad_enabled(gradients):
        trial(*args, **kwargs)
    return noted


class _Noting(RPQWeight):
    """A weight of the copy that records its products."""

    uses: Counter[Use]

    def part(self) -> Part:
        whole = self.whole()
        whole.note = self._noted
        return whole

    def _noted(self, product: Product, x: Tensor, arguments: tuple[Any, ...], path: tuple[Any, ...]) -> None:
        self.uses[Use.of(product, x, arguments, path)] += 1


@contextlib.contextmanager
def _random_states_kept(model: nn.Module) -> Iterator[None]:
    """Puts back torch's random states, on the CPU and wherever the model is, and Python's."""
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type not in ("cpu", "meta")}
    before = random.getstate()
    try:
        with contextlib.ExitStack() as stack:
            for kind in {device.type for device in devices} or {"cuda"}:  # without devices, the CPU's alone
                indices = sorted(device.index or 0 for device in devices if device.type == kind)
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
            yield
    finally:
        random.setstate(before)


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Compiled parts of a model run as they were written: what is compiled does not note anything."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and loading the compiler takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
