"""Fine-tuning of a quantized model, against the dense model that it was made from."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from rpqfx.errors import InputError
from rpqfx.graph.snapshot import Ambient
from rpqfx.nn.wrappers import refuse_distributed, unwrapped
from rpqfx.reporting.progress import Progress
from rpqfx.training.checks import check_options
from rpqfx.training.data import Data, feed
from rpqfx.training.distillation import Distillation
from rpqfx.training.loop import Loss, Run, Settings
from rpqfx.training.parameters import Choose, Rates, held
from rpqfx.training.resume import Resume, dependencies

_EVERY = 50  # steps between two states on disk


@dataclass(frozen=True)
class Finetuned:
    """The result of `finetune` and `finetune_routes`; ``str`` says it in words.

    Args:
        losses: Loss of each step.
        weights: How many weights are quantized.
        trained: How many numbers were trained, codes not counted.
        recoded: How often a sub-vector has been given another code.
        codes: How many codes there are.
        seconds: Time that it took.
    """

    losses: tuple[float, ...] = field(repr=False)
    weights: int
    trained: int
    recoded: int
    codes: int
    seconds: float

    @property
    def steps(self) -> int:
        """The number of steps that were made."""
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
        said = (
            f"{self.steps} steps in {self.seconds:.0f} s: loss {self.before:.4g} -> {self.after:.4g} (means of the "
            "first and last tenth); "
        )
        if not self.weights:
            return f"{said}{self.trained:,} numbers trained"
        return (
            f"{said}{self.weights} quantized weights, {self.trained:,} numbers trained, "
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
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
) -> Finetuned:
    """Trains a quantized model in place, so that it comes near to its dense teacher.

    Codebooks, scales, norms and biases take the steps of Adam, with a short warm-up and a cosine to zero. With
    ``recode`` codes change as well: a latent dense matrix behind each weight takes the gradients of the quantized one,
    and a sub-vector whose latent has come nearer to another entry gets that entry's code. The contents of a saved file
    stay the same in number and width: shared codebooks stay shared, and numbers that were exact in half
    precision are rounded to it at the end.

    While it runs, each weight is decoded once a step: it takes the memory of the dense model and its gradient, and with
    ``recode`` of three more.

    Args:
        small: A model that [`rpqify`][rpqfx.rpqify] or [`convert`][rpqfx.convert] returned, in float32; it is trained
            in eval mode (no dropout), and left in the mode it is in. Of a wrapped one (``torch.compile``,
            ``DataParallel``, ``AveragedModel``) the model within is trained, as it is without the wrapper.
        teacher: The dense model. May be left out where ``loss`` needs none.
        data: Batches, each a tensor, a tuple of positional inputs or a mapping of keyword inputs: a sequence, which is
            gone through in a new order each time; another iterable; or a callable that is given 0, 1, 2, ...
        steps: Steps of the optimiser.
        loss: From the student's output, the teacher's (or None) and the batch to a scalar. Left out, the divergence of
            logits or the relative squared difference of outputs
            ([`Distillation`][rpqfx.training.distillation.Distillation]).
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
        seed: Seeds the order of batches, where ``data`` is a sequence; 0 if left out.
        progress: Called with (done, total, loss in words) after each step.
        checkpoint: Folder for the state of the training. The same call with the same folder, on the model as it was
            at first, goes on where it was interrupted, to the same result to the last bit; one that is finished gives
            its result at once.
        checkpoint_every: Steps between two states, of which the folder holds the last; 50 if left out. Does not change
            the result.

    Returns:
        Losses and counts; print it.

    Raises:
        RewriteError: If the model is in ``DistributedDataParallel`` or FSDP.
        InputError: If nothing is quantized, there is no data, neither teacher nor loss is given, outputs cannot be
            compared, or an argument is out of range or would do nothing beside the others.
        TrainingError: If a loss or its gradient is not finite; the model is then as it was at the last that was.
        FormatError: If the checkpoint folder holds a fine-tuning of another model, teacher, loss, setting or data.
        OSError: If the checkpoint folder cannot be written; what was saved before stays, and so does the model as the
            last step left it.
    """
    check_options(
        small, teacher, data, steps=steps, loss=loss, logits=logits, recode=recode, recode_every=recode_every,
        rates=rates, train=train, norms=norms, autocast=autocast, accumulate=accumulate, clip=clip, seed=seed,
        progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    refuse_distributed(small, "finetune")
    model, guide = unwrapped(small), None if teacher is None else unwrapped(teacher)
    settings = Settings(
        steps, recode, recode_every or 1, rates or Rates(), norms, autocast, accumulate, clip, seed or 0
    )
    run = Run(model, guide, loss or Distillation(logits), settings, held(model))
    return carried_out(run, data, train=train, progress=progress, checkpoint=checkpoint, every=checkpoint_every)


def carried_out(
    run: Run, data: Data, *, train: Choose | None, progress: Progress | None,
    checkpoint: str | os.PathLike[str] | None, every: int | None,
) -> Finetuned:  # fmt: skip
    """Trains a model in place, step by step; wherever this stops, the model is whole.

    Args:
        run: What is to be done.
        data: Batches.
        train: Chooses Parameters by name, as ``Trained`` takes it.
        progress: Called after each step.
        checkpoint: Folder for the state, or None.
        every: Steps between two states.

    Returns:
        What was done.

    Raises:
        InputError: If teacher and student are one model, or as ``Run``.
    """
    steps, order, every = run.settings.steps, run.settings.seed, every or _EVERY
    batches = feed(data, order) if checkpoint is None else iter(())
    if run.teacher is run.model:
        raise InputError(
            "teacher is the dense model, got the model that is to be trained, which has nothing to teach it"
        )
    store, began = None, time.perf_counter()
    ambient = Ambient(None)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            run.start(train)
            if checkpoint is not None:
                store = Resume(checkpoint, run, *dependencies(run, data), data, order)
                batches = store.start()
                began -= store.seconds
            while len(run.losses) < steps:
                run.step(batches)
                done = len(run.losses)
                if store is not None and done % every == 0 and done < steps:
                    store.save(time.perf_counter() - began)
                if progress is not None:
                    progress(done, steps, f"loss {run.losses[-1]:.4g}")
            run.stop()
            seconds = time.perf_counter() - began
            if store is not None and not store.finished:
                store.finish(seconds)
        codes = sum(weight.codes.numel() for weight in run.weights)
        numbers = sum(parameter.numel() for parameter in run.trained.all)
        return Finetuned(tuple(run.losses), len(run.weights), numbers, run.recoded, codes, seconds)
    except BaseException:
        run.stop()
        ambient.restore()
        raise
