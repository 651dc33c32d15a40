"""Checks of what ``finetune`` is given, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rpqfx.errors import InputError
from rpqfx.policies.arguments import check_model, check_path, check_progress
from rpqfx.training.parameters import Rates
from rpqfx.validation.values import check_seed, flag, number, one_of, shown, whole


def check_options(
    small: Any, teacher: Any, data: Any, *, steps: Any, loss: Any, logits: Any, recode: Any, recode_every: Any,
    rates: Any, train: Any, norms: Any, autocast: Any, accumulate: Any, clip: Any, seed: Any, progress: Any,
    checkpoint: Any, checkpoint_every: Any,
) -> None:  # fmt: skip
    """Raises an error unless the arguments of a fine-tuning are valid and each of them has an effect.

    The arguments are those of ``finetune``.

    Raises:
        InputError: If one is not, or would do nothing.
    """
    check_model(small, "finetune")
    if teacher is None and loss is None:
        raise InputError("give a teacher, the dense model, or a loss that needs none")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise InputError(f"teacher is the dense model, a torch.nn.Module, got {shown(teacher)}")
    for name, count in (("steps", steps), ("accumulate", accumulate)):
        whole(name, count, 1, error=InputError)
    number("clip", clip, "a norm above 0", lambda value: value > 0, error=InputError)
    flag("recode", recode, error=InputError)
    if recode_every is not None:
        whole("recode_every", recode_every, 1, what="of steps", error=InputError)
        if not recode:
            raise InputError(f"recode_every={recode_every} would do nothing with recode=False; leave out one of them")
    for name, function in (("loss", loss), ("train", train)):
        if function is not None and not callable(function):
            raise InputError(f"{name} is a callable or None, got {shown(function)}")
    if logits is not None:
        flag("logits", logits, error=InputError)
        if loss is not None:
            raise InputError(f"logits={logits} would do nothing beside a loss, which compares the outputs itself")
    if rates is not None and not isinstance(rates, Rates):
        raise InputError(f"rates are Rates (rpqfx.training.parameters.Rates(codebooks=1e-3, ...)), got {shown(rates)}")
    one_of("norms", norms, ("keep", "update"), error=InputError)
    if norms == "update" and not any(isinstance(module, _BatchNorm) for module in small.modules()):
        raise InputError("norms='update' would do nothing: the model has no batch norm; leave it out")
    if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
        raise InputError(f"autocast is a floating dtype, such as torch.bfloat16, or None, got {shown(autocast)}")
    if seed is not None:
        check_seed(seed)
        if not isinstance(data, Sequence):
            raise InputError(
                f"seed={seed} would do nothing: it brings a sequence in order, and data of type {type(data).__name__} "
                "comes in an order of its own; leave it out, or give a list"
            )
    check_progress(progress, switches=False)
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    if checkpoint_every is not None:
        whole("checkpoint_every", checkpoint_every, 1, what="of steps", error=InputError)
        if checkpoint is None:
            raise InputError("checkpoint_every is for a checkpoint; give checkpoint=, a folder, as well")
