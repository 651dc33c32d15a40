"""A first run of a model whose attention is to use codes, so that refusals come before anything is fitted."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError, RewriteError, RPQError
from rpqfx.graph.attention import AttentionSite
from rpqfx.graph.calibration.batches import Batches
from rpqfx.graph.module_graphs import evaluating
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.first_run import Trial
from rpqfx.kv.module import KVAttention
from rpqfx.kv.wrap import OF_TRANSFORMERS, unwrap

Cores = dict[AttentionSite, KVAttention]

# Inputs of a batch beside which tokens alone say all; with others (images, say) a part of them would say less.
_OF_TOKENS = {"input_ids", "attention_mask", "labels", "use_cache", "position_ids", "token_type_ids"}
_TOKENS = 6
_APART = 1e-2  # of the largest number, more than attention in parts rounds otherwise than in one


def _whose(error: InputError, model: nn.Module, cores: Cores, batches: Batches) -> InputError | RewriteError:
    """Returns the error of a batch that failed: the batch's own, or ours where the dense model takes the batch."""
    if isinstance(error.__cause__, RPQError):
        return error
    for site in cores:
        unwrap(site)
    try:
        with evaluating(model), torch.no_grad():
            batches.runs[0]()
    except InputError as dense:
        return dense
    cause = error.__cause__ or error
    return RewriteError(
        f"{type(model).__name__} attends in a way that is not computed on codes ({type(cause).__name__}: {cause})"
    )


class Spoken(NamedTuple):
    """Tokens of a batch that a model makes a cache of.

    Args:
        name: Of the argument that they come as.
        ids: ``[B, T]``.
        others: Arguments that every call gets besides; those of the encoder, where there is one.
    """

    name: str
    ids: Tensor
    others: dict[str, Any]


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
    except InputError as error:
        raise _whose(error, model, cores, batches) from error
    finally:
        for core in cores.values():
            core.trial = None
    left: Cores = {}
    for site, core in cores.items():
        if trials[site].ahead is not None and site.kind in OF_TRANSFORMERS:
            unwrap(site)
        else:
            left[site] = core
    if all(trials[site].keys is None for site in left):
        why = next((trial for trial in trials.values() if trial.ahead is not None), None)
        if why is not None:
            raise RewriteError(f"there is no attention that a cache serves; of {why.name}: {why.ahead}")
        raise RewriteError("no attention module ran on the calibration batches; skip none, or calibrate with others")
    sharing = _sharing(left, trials)
    spoken = _spoken(model, batches)
    if spoken is not None and all(trials[site].keys is not None for site in left):
        with _uncoded(left, trials), evaluating(model), torch.no_grad():
            _rehearse(model, spoken, left.values())
    return left, sharing


def _sharing(cores: Cores, trials: dict[AttentionSite, Trial]) -> dict[KVAttention, KVAttention]:
    first: dict[int, KVAttention] = {}
    found = {}
    for site, core in cores.items():
        keys = trials[site].keys
        if keys is not None and first.setdefault(id(keys), core) is not core:
            found[core] = first[id(keys)]
    return found


def _spoken(model: nn.Module, batches: Batches) -> Spoken | None:
    """Returns what a cache can be rehearsed with; None where the model makes none, or a batch is more than tokens."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or not model.can_generate():
        return None
    args, kwargs = batches.calls[0]
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    name = "decoder_input_ids" if both else "input_ids"
    given = {key: value for key, value in kwargs.items() if key not in ("labels", "use_cache")}
    ids = given.pop(name, None if both or not args else args[0])
    alone = not args if both else len(args) + (name in kwargs) == 1 and set(given) <= _OF_TOKENS
    if not alone or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.shape[1] < 3:
        return None
    if any(key.startswith("decoder_") for key in given):
        return None
    return Spoken(name, ids[:, :_TOKENS], given) if both else Spoken(name, ids[:1, :_TOKENS], {})


@contextmanager
def _uncoded(cores: Cores, trials: dict[AttentionSite, Trial]) -> Iterator[None]:
    """Gives attention coders of the shapes that were seen, and a window that is never left, meanwhile."""
    before = {core: core.policy for core in cores.values()}
    try:
        for site, core in cores.items():
            core.policy = dataclasses.replace(core.policy, window=2**20)
            for side, x in (("keys", trials[site].keys), ("values", trials[site].values)):
                assert x is not None
                options: dict[str, Any] = {"transform": False, "joint": False, "codebook_size": 2, "stages": 1}
                coder = HeadCoder(x.shape[1], x.shape[3], codebook_dim=x.shape[3], device=x.device, **options)
                setattr(core, side, coder)
        yield
    finally:
        for core, policy in before.items():
            core.policy = policy
            for side in ("keys", "values"):
                core._modules.pop(side, None)


def _rehearse(model: Any, spoken: Spoken, cores: Iterable[KVAttention]) -> None:
    """Compares steps with a cache of codes with one call on all tokens, or with steps on the model's own cache."""
    whole = model(**{spoken.name: spoken.ids}, **spoken.others, use_cache=False).logits
    steps = _with_codes(model, spoken, whole.shape)
    if whole.dtype not in (torch.float32, torch.float64) or _alike(steps, whole):
        return
    own = _with_own_cache(model, spoken, cores)
    if own is None or not _alike(steps, own):
        gap, size = (steps - whole).abs().max(), whole.abs().max()
        raise RewriteError(
            f"{type(model).__name__} gives other results with a cache of codes than without, with nothing coded "
            f"(by {float(gap / size):.1g} of their size), so its attention cannot be served"
        )


def _with_codes(model: Any, spoken: Spoken, shape: torch.Size) -> Tensor:
    """Returns the logits of steps with a cache of codes."""
    from rpqfx.kv.transformers import TransformersCache

    try:
        return _stepped(model, spoken, TransformersCache(model))
    except Exception as error:  # foreign code
        first = error
    try:  # some want all tokens, and take those that the cache has not (XLM)
        steps = _stepped(model, spoken, TransformersCache(model), whole=True)
        if steps.shape == shape:
            return steps
    except Exception:
        pass
    raise RewriteError(
        f"{type(model).__name__} cannot be given a cache of codes ({type(first).__name__}: "
        f"{str(first).partition(';')[0]})"
    ) from first


def _with_own_cache(model: Any, spoken: Spoken, cores: Iterable[KVAttention]) -> Tensor | None:
    """Returns what the dense model gives with its own cache; None where it cannot be stepped through."""
    from transformers.cache_utils import DynamicCache

    before = {core: core.trial for core in cores}
    try:
        for core in before:
            core.trial = Trial(core.name)  # so that it attends to what it is handed
        return _stepped(model, spoken, DynamicCache(config=model.config))
    except Exception:  # foreign code
        return None
    finally:
        for core, trial in before.items():
            core.trial = trial


def _stepped(model: Any, spoken: Spoken, cache: Any, whole: bool = False) -> Tensor:
    """Returns logits of a prompt and of two tokens after it, which come alone or after all before them."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    if spoken.others:
        cache = EncoderDecoderCache(cache, DynamicCache())
    found = []
    ids = spoken.ids
    prompt = ids.shape[1] - 2
    for part in [ids[:, : prompt + i] for i in range(3)] if whole else ids.split([prompt, 1, 1], 1):
        found.append(model(**{spoken.name: part, name: cache}, **spoken.others, use_cache=True).logits)
    return torch.cat(found, 1)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= _APART * wanted.abs().max() + 1e-30)
