"""Fine-tuning of a model in codebooks, against the dense model that it was made from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rpqfx.convert.batches import arguments
from rpqfx.errors import InputError, TrainingError
from rpqfx.graph.rewrite import Progress
from rpqfx.tuning.checks import check_options
from rpqfx.tuning.cut import CutWeight
from rpqfx.tuning.feed import Data, feed
from rpqfx.tuning.latent import Latent
from rpqfx.tuning.losses import Distillation
from rpqfx.tuning.trained import Choose, Good, Rates, Trained, held

Loss = Callable[[Any, Any, Any], Tensor]

_BETAS = (0.9, 0.95)
_WARM = 0.05


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` did; ``str`` says it in words.

    Args:
        losses: Of each step.
        weights: How many weights are in codebooks.
        trained: How many numbers were trained, codes not counted.
        recoded: How often a sub-vector has been given another code.
        codes: How many codes there are.
        seconds: What it took.
    """

    losses: tuple[float, ...] = field(repr=False)
    weights: int
    trained: int
    recoded: int
    codes: int
    seconds: float

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.losses)

    @property
    def before(self) -> float:
        """Mean loss of the first tenth of the steps."""
        first = self.losses[: max(1, self.steps // 10)]
        return sum(first) / len(first)

    @property
    def after(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = self.losses[-max(1, self.steps // 10) :]
        return sum(last) / len(last)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps in {self.seconds:.0f} s: loss {self.before:.4g} -> {self.after:.4g} (means of the "
            f"first and last tenth); {self.weights} weights in codebooks, {self.trained:,} numbers trained, "
            f"{self.recoded:,} changes among {self.codes:,} codes"
        )


def finetune(
    small: nn.Module,
    *,
    teacher: nn.Module | None = None,
    data: Data,
    steps: int = 200,
    loss: Loss | None = None,
    logits: bool | None = None,
    recode: bool = True,
    recode_every: int | None = None,
    rates: Rates | None = None,
    train: Choose | None = None,
    norms: Literal["keep", "update"] = "keep",
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    clip: float = 1.0,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Trains what a model in codebooks has left to train, so that it comes near to its dense teacher.

    Codebooks, scales, norms and biases take the steps of Adam, with a short warm-up and a cosine to zero. With
    ``recode`` codes change as well: behind each weight a dense matrix takes the gradients that the quantised one gets,
    and a sub-vector whose place in it has come nearer to another entry is given that one's code. What a saved file
    holds stays the same in number and width: shared codebooks stay shared, and numbers that were exact in half
    precision are rounded to it at the end.

    While it runs, each weight is decoded once a step: it takes the memory of the dense model and its gradient, and with
    ``recode`` of three more.

    Args:
        small: What [`rpqify`][rpqfx.rpqify] returned, in float32; trained in place, in eval mode (no dropout), and
            left in the mode it is in.
        teacher: The dense model. May be left out where ``loss`` needs none.
        data: Batches, each a tensor, a tuple of positional inputs or a mapping of keyword inputs: a sequence, which is
            gone through in a new order each time; another iterable; or a callable that is given 0, 1, 2, ...
        steps: Of the optimiser.
        loss: From the student's output, the teacher's (or None) and the batch to a scalar. Left out, the divergence of
            logits or the relative squared difference of outputs
            ([`Distillation`][rpqfx.tuning.losses.Distillation]).
        logits: Whether outputs are logits; left out, those that have ``logits`` are.
        recode: Whether codes change. Those of weights with several stages and signs do not.
        recode_every: Steps between two looks for nearer entries; 1 if left out.
        rates: Learning rates.
        train: Chooses Parameters by their qualified names; left out, codebooks, scales and dense Parameters of one
            axis.
        norms: Whether batch norms use their statistics as they are (``"keep"``) or those of each batch, and update
            them (``"update"``).
        autocast: Products in this dtype, of student and teacher.
        accumulate: Batches a step.
        clip: Norm to which a step's gradient is shortened.
        seed: Of the order of batches, where ``data`` is a sequence; 0 if left out.
        progress: Called with (done, total, loss in words) after each step.

    Returns:
        Losses and counts; print it.

    Raises:
        InputError: If nothing is in codebooks, there is no data, neither teacher nor loss is given, outputs cannot be
            compared, or an argument is out of range or would do nothing beside the others.
        TrainingError: If a loss or its gradient is not finite; the model is then as it was at the last that was.
    """
    check_options(
        small, teacher, data, steps=steps, loss=loss, logits=logits, recode=recode, recode_every=recode_every,
        rates=rates, train=train, norms=norms, autocast=autocast, accumulate=accumulate, clip=clip, seed=seed,
        progress=progress,
    )  # fmt: skip
    model = getattr(small, "_orig_mod", small)  # as it was before torch.compile
    guide = getattr(teacher, "_orig_mod", teacher)
    compare = loss or Distillation(logits)
    run = _Run(model, guide, feed(data, seed or 0), compare, autocast, accumulate)
    began = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad(), _modes(model, guide, norms):
        try:
            run.start(rates or Rates(), train, recode, steps)
            for step in range(steps):
                run.step(step, clip, recode_every or 1)
                if progress is not None:
                    progress(step + 1, steps, f"loss {run.losses[-1]:.4g}")
        finally:
            run.finish()
    codes = sum(weight.codes.numel() for weight in run.weights)
    seconds = time.perf_counter() - began
    return Finetuned(tuple(run.losses), len(run.weights), run.numbers, run.recoded, codes, seconds)


class _Run:
    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, batches: Iterator[Any], loss: Loss,
        autocast: torch.dtype | None, accumulate: int,
    ) -> None:  # fmt: skip
        self._model, self._teacher, self._batches, self._loss = model, teacher, batches, loss
        self._autocast, self._accumulate = autocast, accumulate
        self.weights = held(model)
        self._kind = self.weights[0].codebooks.device.type
        self.losses: list[float] = []
        self.recoded = self._seen = 0
        self._trained: Trained | None = None

    def start(self, rates: Rates, train: Choose | None, recode: bool, steps: int) -> None:
        self._trained = Trained(self._model, self.weights, train)
        self._cut = [CutWeight.of(weight) for weight in self.weights]
        self._latents = {cut: Latent(cut) for cut in self._cut if recode and Latent.fits(cut)}
        self._good = Good(self._model, self._trained, self.weights)
        self.numbers = sum(parameter.numel() for parameter in self._trained.all)
        groups = self._trained.groups(rates, self._latents.values())
        self._adam = torch.optim.Adam(groups, betas=_BETAS)
        warm = max(1, math.ceil(_WARM * steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda n: min((n + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * n / steps))
        )

    def step(self, number: int, clip: float, recode_every: int) -> None:
        total = 0.0
        for _ in range(self._accumulate):
            loss = self._forward() / self._accumulate
            total += float(loss.detach())
            if not math.isfinite(total):
                self._good.restore()
                raise TrainingError(f"the loss of step {number} is {total}; {_REMEDY}")
            loss.backward()
        self._good.keep()
        for cut in self._cut:
            cut.collect()
            if cut in self._latents and cut.vectors.grad is not None:
                self._latents[cut].push(cut.vectors.grad)
        self._clip(number, clip)
        self._adam.step()
        self._adam.zero_grad()
        self._schedule.step()
        if (number + 1) % recode_every == 0:
            apart: dict[tuple[int, int], Tensor] = {}
            self.recoded += sum(latent.recode(apart) for latent in self._latents.values())
        for cut in self._cut:
            cut.decode()
        self.losses.append(total)

    def _forward(self) -> Tensor:
        batch = next(self._batches, None)
        if batch is None:
            raise InputError(
                f"data ended after {self._seen} batches; give a sequence, which is gone through again, or more"
                if self._seen
                else "there is no data: it holds no batch"
            )
        args, kwargs = arguments(batch, f"batch {self._seen}")
        self._seen += 1
        with torch.autocast(self._kind, self._autocast, enabled=self._autocast is not None):
            wanted = None
            if self._teacher is not None:
                with torch.no_grad():
                    wanted = self._teacher(*args, **kwargs)
            found = self._model(*args, **kwargs)
        return self._loss(found, wanted, batch)

    def _clip(self, number: int, clip: float) -> None:
        tensors = [tensor for group in self._adam.param_groups for tensor in group["params"]]
        norm = nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"the gradient of step {number} is not finite; {_REMEDY}")
        nn.utils.clip_grads_with_norm_(tensors, clip, norm)

    def finish(self) -> None:
        for weight in self.weights:
            if isinstance(weight, CutWeight):
                weight.uncut()
        if self._trained is not None:
            self._trained.restore()


_REMEDY = "the model is as it was before that step's update. Try lower rates, or look for bad numbers in the data"


@contextmanager
def _modes(model: nn.Module, teacher: nn.Module | None, norms: str) -> Iterator[None]:
    """Eval mode, of batch norms as they are asked for, for a while."""
    modules = [*model.modules(), *(teacher.modules() if teacher is not None else ())]
    before = [(module, module.training) for module in modules]
    for module in modules:
        module.training = False
    for module in model.modules() if norms == "update" else ():
        if isinstance(module, _BatchNorm):
            module.training = True
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
