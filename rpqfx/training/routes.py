"""Training of the routers and light branches of a routed model, against the dense one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from rpqfx.errors import InputError
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import refuse_distributed, unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.reporting.progress import Progress
from rpqfx.routing.rewrite.rewrite import routed
from rpqfx.training.checks import check_options
from rpqfx.training.data import Data
from rpqfx.training.distillation import Distillation
from rpqfx.training.easing import Easing
from rpqfx.training.finetune import Finetuned, carried_out
from rpqfx.training.loop import Loss, Run, Settings
from rpqfx.training.parameters import Choose, Rates
from rpqfx.validation.values import number


def finetune_routes(
    model: nn.Module,
    *,
    teacher: nn.Module | None = None,
    data: Data,
    steps: int = 200,
    loss: Loss | None = None,
    logits: bool | None = None,
    anneal: float = 0.5,
    rates: Rates | None = None,
    train: Choose | None = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    clip: float = 1.0,
    seed: int | None = None,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
) -> Finetuned:
    """Trains the routers and light branches of a routed model in place, so that it comes near to its dense teacher.

    They take the steps of Adam, with a short warm-up and a cosine to zero; all else stays as it is. At first nearly all
    tokens are heavy, and as many fewer with each step until, after the share ``anneal`` of the steps, they are the
    policy's number. Blocks may be quantized, whose codes stay as they are, and attention on codes
    ([`quantize_kv`][rpqfx.quantize_kv]).

    Args:
        model: A model that [`route`][rpqfx.route] returned, in float32; it is trained in eval mode (no dropout), and
            left in the mode it is in. Of a wrapped one (``torch.compile``, ``DataParallel``, ``AveragedModel``) the
            model within is trained, as it is without the wrapper.
        teacher: The dense model. May be left out where ``loss`` needs none.
        data: Batches, as [`finetune`][rpqfx.finetune] takes them; of a causal model longer than its policy's window,
            within which all tokens are heavy.
        steps: Steps of the optimiser.
        loss: As ``finetune`` takes it.
        logits: As ``finetune`` takes it.
        anneal: Share of the steps, 0 to 1, in which the tokens become as few as the policy says.
        rates: Learning rates; ``dense`` is that of routers and light branches, if they are in no codebooks.
        train: Chooses Parameters by their qualified names; left out, those of routers and light branches.
            ``lambda name: True`` trains the whole model.
        autocast: Products in this dtype, of student and teacher.
        accumulate: Batches a step.
        clip: Norm to which a step's gradient is shortened.
        seed: Seeds the order of batches, where ``data`` is a sequence; 0 if left out.
        progress: Called with (done, total, loss in words) after each step.
        checkpoint: Folder for the state of the training, as ``finetune`` keeps it: the same call, on the model as it
            was at first, goes on where it was interrupted, to the same result to the last bit.
        checkpoint_every: Steps between two states, of which the folder holds the last; 50 if left out. Does not change
            the result.

    Returns:
        Losses and counts; print it. Losses rise while tokens become fewer.

    Raises:
        RewriteError: If the model is in ``DistributedDataParallel`` or FSDP.
        InputError: If nothing is routed, there is no data, neither teacher nor loss is given, outputs cannot be
            compared, a quantized light branch is zero and could not learn, every token of a batch is heavy though
            the policy says otherwise, or an argument is out of range or would do nothing beside the others.
        TrainingError: If a loss or its gradient is not finite; the model is then as it was at the last that was.
        FormatError: If the checkpoint folder holds a fine-tuning of another model, teacher, loss, setting or data.
        OSError: If the checkpoint folder cannot be written; what was saved before stays, and so does the model as the
            last step left it.
    """
    check_model(model, "finetune_routes")
    check_options(
        model, teacher, data, steps=steps, loss=loss, logits=logits, recode=False, recode_every=None, rates=rates,
        train=train, norms="keep", autocast=autocast, accumulate=accumulate, clip=clip, seed=seed, progress=progress,
        checkpoint=checkpoint, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    number("anneal", anneal, "a share of the steps, 0 to 1", lambda value: 0 <= value <= 1, error=InputError)
    refuse_distributed(model, "finetune_routes")
    student = unwrapped(model)
    names = route_parameters(student)
    weights = [module for module in student.modules() if isinstance(module, RPQWeight)]
    chosen = train or names.__contains__
    _check(student, weights, chosen)
    settings = Settings(steps, False, 1, rates or Rates(), "keep", autocast, accumulate, clip, seed or 0)
    guide = None if teacher is None else unwrapped(teacher)
    run = Run(student, guide, loss or Distillation(logits), settings, weights, Easing(student, anneal, steps))
    return carried_out(run, data, train=chosen, progress=progress, checkpoint=checkpoint, every=checkpoint_every)


def route_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the Parameters of routers and light branches.

    Args:
        model: Any model.

    Raises:
        InputError: If nothing in it is routed.
    """
    own = {id(parameter) for route in routed(model).values() for parameter in route.parameters()}
    if not own:
        raise InputError("nothing in this model is routed, so there are no routers to train; pass what route returned")
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _check(model: nn.Module, weights: Sequence[RPQWeight], chosen: Choose) -> None:
    """Raises an error where what is chosen cannot be trained."""
    zero = {id(weight.codebooks) for weight in weights if not weight.codebooks.is_meta and not weight.codebooks.any()}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            check_not_offloaded(offloaded(model), "trained")
            raise InputError("the model is on the meta device, where nothing runs; load its values first")
        if not chosen(name) or not parameter.is_floating_point():
            continue
        if parameter.dtype.itemsize < 4:
            raise InputError(
                f"steps are too small for {name} in {parameter.dtype}; call model.float() first, and give "
                "autocast=torch.bfloat16 for products in half precision"
            )
        if id(parameter) in zero:
            raise InputError(
                f"{name} is zero, so that its entries cannot learn: it was put into codebooks before it was anything. "
                'Call route after rpqify, or leave light branches out of codebooks (Rule("*.routed*", skip="light")), '
                'or begin with RoutePolicy(light_init="fit")'
            )
