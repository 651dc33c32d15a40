"""The steps that ``rpqify`` and ``convert`` share: capture, decide and replace, undone where one of them fails."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rpqfx.conversion.conversion import convert_sites
from rpqfx.conversion.ranks import Ranks
from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.graph.calibration.batches import calibration_of
from rpqfx.graph.copying import copy_model
from rpqfx.graph.module_graphs import capture
from rpqfx.graph.presence import check_loaded
from rpqfx.graph.pretrained_calls import renew_calls
from rpqfx.graph.replace import parameter_at, rewrite
from rpqfx.graph.sites import find_sites, is_rewritten
from rpqfx.graph.snapshot import Snapshot, small_tensors
from rpqfx.nn.wrappers import refuse_distributed, rewrapped, unwrapped
from rpqfx.policies.amount import Rate
from rpqfx.policies.arguments import check_model, check_policy, check_progress
from rpqfx.policies.decide import decide_all
from rpqfx.policies.decision import KeepDense
from rpqfx.policies.policy import Decide, Policy, Quantize
from rpqfx.reporting.progress import Progress
from rpqfx.reporting.progress import shown as shown_progress
from rpqfx.reporting.records import attach_records, attached_records
from rpqfx.reporting.report import dense_bytes
from rpqfx.validation.values import check_seed, flag


def rewritten(
    call: str, model: nn.Module, policy: Policy | Decide | None, *, inplace: bool, seed: int | None,
    progress: Progress | bool | None, calibration: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None, ranks: Ranks | None = None,
) -> nn.Module:  # fmt: skip
    """Returns what the public function ``call`` does; whatever this raises, ``model`` is as it was."""
    check_model(model, call)
    check_policy(policy, Policy, call=call, any_callable=True)
    assert policy is not None
    flag("inplace", inplace, error=InputError)
    refuse_distributed(model, call)
    if seed is not None:
        check_seed(seed)
    check_progress(progress)
    if (inner := unwrapped(model)) is not model:
        small = rewritten(
            call, inner, policy, inplace=inplace, seed=seed, progress=progress, calibration=calibration,
            checkpoint=checkpoint, ranks=ranks,
        )  # fmt: skip
        return rewrapped(model, small)
    if is_rewritten(model):
        raise RewriteError(
            "this model already has quantized weights; start from the dense model, with one policy whose rules "
            "say what differs from layer to layer"
        )
    converts = calibration is not None or has_rate(policy)
    before = Snapshot(model, values=small_tensors(model) if inplace and converts else ())
    try:
        batches = [] if calibration is None else calibration_of(calibration)
        with torch.inference_mode(False):  # what is made in it could not be trained
            return _rewritten(model, policy, inplace, seed, progress, batches, checkpoint, ranks)
    except BaseException:
        before.restore()
        raise


def has_rate(policy: Policy | Decide | None) -> bool:
    """Returns whether a policy takes a number of bits a weight, so that weights are decided and fitted together."""
    return isinstance(policy, Policy) and isinstance(policy.amount, Rate)


def _rewritten(
    model: nn.Module, policy: Policy | Decide, inplace: bool, seed: int | None, progress: Progress | bool | None,
    batches: list[Any], checkpoint: str | os.PathLike[str] | None, ranks: Ranks | None,
) -> nn.Module:  # fmt: skip
    """See ``rewritten``; where this raises, ``model`` may be anything."""
    captured = capture(model)
    sites = find_sites(captured)
    others = dense_bytes(model) - sum(site.dense_bytes for site in sites)
    decisions, notes = decide_all(policy, sites, others)
    weigh = has_rate(policy)
    if batches or weigh:
        _check_fitted(decisions, "calibration" if batches else "bits_per_weight")
    check_loaded(captured.model, sites, decisions)
    if not inplace:
        replaced = [parameter_at(model, site.name) for site in sites if isinstance(decisions[site.name], Quantize)]
        captured = dataclasses.replace(captured, model=copy_model(model, replaced))
    if batches or weigh:

        def decide(importance: Mapping[str, float]) -> dict[str, Quantize | KeepDense]:
            return decide_all(policy, sites, others, importance)[0] if importance else decisions

        small = convert_sites(
            captured.model, sites, decide, batches, weigh=weigh, seed=seed or 0,
            progress=shown_progress(progress, quiet=not batches), checkpoint=checkpoint, ranks=ranks,
        )  # fmt: skip
    else:
        small = rewrite(captured, decisions, sites, seed=seed, progress=shown_progress(progress, quiet=True))
    records, more = attached_records(small) or ((), ())
    attach_records(small, records, (*notes, *more))
    renew_calls(small)
    if ranks is not None:
        ranks.gather("the end", None)  # nobody keeps a result while another fails
    return small


def _check_fitted(decisions: Mapping[str, Quantize | KeepDense], by: str) -> None:
    """Raises an error where a conversion would have codebooks to draw anew."""
    for name, decision in decisions.items():
        if isinstance(decision, Quantize) and decision.init != "fit":
            raise PolicyError(
                f"{name}: init={decision.init!r} draws codebooks anew, and {by} fits them to the weight that is there; "
                "use a policy that fits (Policy(...), Policy.pretrained(...)), or rpqify, which takes no calibration"
            )
