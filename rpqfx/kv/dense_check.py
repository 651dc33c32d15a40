"""A first run of a model whose attention is to be held in codes, so that refusals come before anything is fitted."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import RewriteError
from rpqfx.graph.attention import AttentionSite
from rpqfx.graph.calibration.batches import Batches
from rpqfx.graph.module_graphs import evaluating
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.first_run import Trial
from rpqfx.kv.module import KVAttention
from rpqfx.kv.wrap import unwrap

Cores = dict[AttentionSite, KVAttention]

# Inputs of a batch beside which tokens alone say all; with others (images, say) a part of them would say less.
_OF_TOKENS = {"input_ids", "attention_mask", "labels", "use_cache", "position_ids", "token_type_ids"}
_TOKENS = 6
_APART = 1e-2  # of the largest number, more than attention in parts rounds otherwise than in one


def tried(model: nn.Module, cores: Cores, batches: Batches) -> tuple[Cores, dict[KVAttention, KVAttention]]:
    """Runs a batch with nothing coded, and a cache's first steps; leaves alone what no cache serves.

    Args:
        model: The model.
        cores: Its attention, wrapped, by where it is.
        batches: Of inputs.

    Returns:
        The attention that stays, and of it that which is handed another's keys and values, with whose.

    Raises:
        RewriteError: If attention of a module is computed in a way that is not known here, a cache of codes cannot be
            used, or nothing is left.
    """
    trials = {site: Trial(core.name) for site, core in cores.items()}
    for site, core in cores.items():
        core.trial = trials[site]
    try:
        with evaluating(model), torch.no_grad():
            batches.runs[0]()
    finally:
        for core in cores.values():
            core.trial = None
    left: Cores = {}
    for site, core in cores.items():
        if trials[site].ahead is not None and site.kind == "transformers":
            unwrap(site)
        else:
            left[site] = core
    if not left:
        why = next(trial for trial in trials.values() if trial.ahead is not None)
        raise RewriteError(f"there is no attention that a cache serves; of {why.name}: {why.ahead}")
    sharing = _sharing(left, trials)
    ids = _tokens(batches) if _generates(model) else None
    if ids is not None and all(trials[site].keys is not None for site in left):
        with _uncoded(left, trials), evaluating(model), torch.no_grad():
            _rehearse(model, ids)
    return left, sharing


def _sharing(cores: Cores, trials: dict[AttentionSite, Trial]) -> dict[KVAttention, KVAttention]:
    first: dict[int, KVAttention] = {}
    found = {}
    for site, core in cores.items():
        keys = trials[site].keys
        if keys is not None and first.setdefault(id(keys), core) is not core:
            found[core] = first[id(keys)]
    return found


def _generates(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def _tokens(batches: Batches) -> Tensor | None:
    """The first tokens of the first batch, ``[1, T]``, where it is tokens alone."""
    args, kwargs = batches.calls[0]
    ids = kwargs.get("input_ids", args[0] if args else None)
    alone = len(args) + ("input_ids" in kwargs) == 1 and set(kwargs) <= _OF_TOKENS
    if not alone or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 3:
        return None
    return ids[:1, :_TOKENS]


@contextmanager
def _uncoded(cores: Cores, trials: dict[AttentionSite, Trial]) -> Iterator[None]:
    """Attention with coders of the shapes that were seen, and a window that is never left."""
    before = {core: core.policy for core in cores.values()}
    try:
        for site, core in cores.items():
            core.policy = dataclasses.replace(core.policy, window=2**20)
            for side, x in (("keys", trials[site].keys), ("values", trials[site].values)):
                assert x is not None
                options: dict[str, Any] = {"transform": False, "joint": False, "entries": 2, "stages": 1}
                coder = HeadCoder(x.shape[1], x.shape[3], sub_vector=x.shape[3], device=x.device, **options)
                setattr(core, side, coder)
        yield
    finally:
        for core, policy in before.items():
            core.policy = policy
            for side in ("keys", "values"):
                core._modules.pop(side, None)


def _rehearse(model: Any, ids: Tensor) -> None:
    """Steps with a cache, held against the tokens in one."""
    from rpqfx.kv.transformers import TransformersCache

    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    whole = model(input_ids=ids, use_cache=False).logits
    try:
        cache, steps, start = TransformersCache(model), [], 0
        for size in (ids.shape[1] - 2, 1, 1):
            steps.append(model(input_ids=ids[:, start : start + size], use_cache=True, **{name: cache}).logits)
            start += size
    except Exception as error:  # foreign code
        raise RewriteError(
            f"{type(model).__name__} cannot be given a cache of codes ({type(error).__name__}: {error})"
        ) from error
    gap, size = (torch.cat(steps, 1) - whole).abs().max(), whole.abs().max()
    if not bool(gap <= _APART * size + 1e-30) and whole.dtype in (torch.float32, torch.float64):
        raise RewriteError(
            f"{type(model).__name__} gives other results with a cache of codes than without, with nothing coded "
            f"(by {float(gap / size):.1g} of their size), so its attention cannot be served"
        )
