"""``convert`` fits the weights of a trained model to codebooks, with an eye on what the model does with data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from rpqfx.conversion.ranks import Ranks
from rpqfx.conversion.rewritten import has_rate, rewritten
from rpqfx.errors import InputError
from rpqfx.policies.arguments import check_model, check_path, check_policy
from rpqfx.policies.policy import Decide, Policy
from rpqfx.reporting.progress import Progress


def convert(
    model: nn.Module,
    policy: Policy | Decide,
    calibration: Iterable[Any] | None,
    *,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Returns a copy of a trained model, or with ``inplace`` the model itself, its weights fitted to data in codebooks.

    The same weights are rewritten as by [`rpqify`][rpqfx.conversion.rpqify.rpqify], but all batches run through the
    model, which pauses before each weight: that is quantized on the inputs that the weights before it, quantized
    already, produce. Statistics of batch norms are estimated again. The report says which weights no batch reached.

    Args:
        model: Any trained module; wrapped ones as ``rpqify`` takes them.
        policy: A [`Policy`][rpqfx.policies.policy.Policy] that fits, most often
            [`Policy.pretrained`][rpqfx.policies.policy.Policy.pretrained], or a callable from a site to a spec or a
            skip.
        calibration: Batches of the model's inputs, each a tensor, a tuple of positional inputs or a mapping of keyword
            inputs. None fits each weight to its own values, as ``rpqify`` does, with a checkpoint; that takes a policy
            with a rate, such as ``Policy.pretrained(3)``.
        inplace: Convert ``model`` itself. Otherwise it is left untouched, and the result shares no tensor with it.
        checkpoint: Folder for finished weights. The same call with the same folder goes on where it was interrupted, to
            the same result.
        seed: Seeds the fits.
        progress: Called with (done, total, site name) after each site. True shows a line with the time left on standard
            error, False none; left out, the line is shown on a terminal.

    Where this raises anything, an interrupt (Ctrl-C) among it, ``model`` is as it was, also with ``inplace``, and so
    are torch's global generators.

    Returns:
        The converted model, of the same class, in the same mode.

    Raises:
        InputError: If ``model`` is not a module, or rejects a batch; if there is no batch, or one is empty or not
            finite, or reaches no weight.
        RewriteError, CaptureError: As ``rpqify``.
        PolicyError: As ``rpqify``; and if codebooks are drawn anew (``init="random"``), which are not calibrated.
        FormatError: If the checkpoint folder holds another conversion.
        OSError: If the checkpoint folder cannot be written; what was saved before stays.
    """
    return converted(
        model, policy, calibration, inplace=inplace, checkpoint=checkpoint, seed=seed, progress=progress, ranks=None
    )


def converted(
    model: nn.Module, policy: Policy | Decide, calibration: Iterable[Any] | None, *, inplace: bool,
    checkpoint: str | os.PathLike[str] | None, seed: int, progress: Progress | bool | None, ranks: Ranks | None,
) -> nn.Module:  # fmt: skip
    """Returns what ``convert`` does; with ``ranks``, made by several processes together."""
    check_model(model, "convert")
    check_policy(policy, Policy, call="convert", any_callable=True)
    if calibration is None and not has_rate(policy):
        raise InputError(
            "convert fits to batches of the model's inputs, got none; give calibration batches, or a policy with a "
            "rate (Policy.pretrained(3)), or call rpqify(model, policy), which needs no data"
        )
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    return rewritten(
        "convert", model, policy, inplace=inplace, seed=seed, progress=progress, calibration=calibration,
        checkpoint=checkpoint, ranks=ranks,
    )  # fmt: skip
