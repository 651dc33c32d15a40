"""Checks of one model whose keys and values are in codes, held against the dense model and against itself."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kv_zoo_models import Architecture, build, encoded, tokens
from torch import Tensor

import rpqfx
from rpqfx.errors import RPQError
from rpqfx.kv import CodebookCache, KVPolicy

_LENGTH, _PROMPT, _NEW = 24, 14, 4
_WIDE, _NARROW = 64, 4
_TO_DENSE, _TO_ITSELF = 1e-4, 1e-3  # of the largest logit

Result = dict[str, Any]


class Subject:
    """A model, and how it is called whole and in parts.

    Args:
        one: What it is.
        model: The model.
    """

    def __init__(self, one: Architecture, model: Any) -> None:
        self.one, self.model = one, model
        self.both = bool(encoded(one, 1))
        parameters = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def encoder_inputs(self, batch: int) -> dict[str, Tensor]:
        """Returns what the encoder gets."""
        return encoded(self.one, batch)

    def call(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """Returns logits ``[B, T, V]`` of tokens, the next ones where there is a cache."""
        given: dict[str, Any] = {"decoder_input_ids" if self.both else "input_ids": x, "use_cache": cache is not None}
        if mask is not None:
            given["decoder_attention_mask" if self.both else "attention_mask"] = mask
            given |= {} if self.both or cache is None else {"position_ids": _positions(mask)[:, -x.shape[1] :]}
        if cache is not None:
            given[self.cache_name] = cache
        logits: Tensor = self.model(**self.encoder_inputs(len(x)), **given).logits
        return logits

    def new_cache(self, codes: bool) -> Any:
        """Returns an empty cache, of codes or as the model makes its own."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache: Any = CodebookCache.for_model(self.model) if codes else DynamicCache(config=self.model.config)
        return EncoderDecoderCache(cache, DynamicCache()) if self.both else cache

    def coming(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Returns what the model is given of tokens for those in a place; XLM takes all, and leaves out what it has."""
        return x[:, :stop] if self.one.kind == "xlm" else x[:, start:stop]

    def parts(self, x: Tensor, sizes: list[int], codes: bool = True, mask: Tensor | None = None) -> Tensor:
        """Returns logits of tokens that come in parts of these sizes."""
        cache, found, start = self.new_cache(codes), [], 0
        for size in sizes:
            seen = None if mask is None else mask[:, : start + size]
            found.append(self.call(self.coming(x, start, start + size), seen, cache))
            start += size
        return torch.cat(found, 1)

    def generate(self, x: Tensor, **options: Any) -> Tensor:
        """Returns what is generated after a prompt, the prompt included."""
        told = self.encoder_inputs(len(x))
        given = {**told, "decoder_input_ids": x} if self.both else {"input_ids": x}
        if not self.both:
            options.setdefault("attention_mask", torch.ones_like(x))
        found: Tensor = self.model.generate(**given, do_sample=False, **options)
        return found


def check(one: Architecture) -> Result:
    """Returns what came of one architecture.

    Args:
        one: The architecture.
    """
    model = build(one)
    found: Result = {"id": one.id, "class": type(model).__name__, "checks": {}}
    x = tokens(1, 2, _LENGTH)
    with torch.no_grad():
        dense = Subject(one, model)
        wanted = dense.call(x)
        said: list[str] = []
        try:
            wide = _small(dense, _WIDE, said)
        except RPQError as error:
            state = "failed" if said else "refused" if _keeps_keys(dense, x) else "none"
            return {**found, "state": state, "detail": f"{type(error).__name__}: {error}"}
        subject = _small(dense, _NARROW, [])
        for name, run in _runs(dense, wide, subject, x, wanted):
            found["checks"][name] = _outcome(run)
    if all(found["checks"][name]["state"] == "n/a" for name in ("cache", "tokens")) and not _keeps_keys(dense, x):
        return {**found, "state": "none", "detail": "whole sequences go through codes; the model takes no cache"}
    bad = [name for name, outcome in found["checks"].items() if outcome["state"] == "failed"]
    return {**found, "state": "failed" if bad else "served", "detail": ", ".join(bad)}


def _keeps_keys(dense: Subject, x: Tensor) -> bool:
    """Returns whether the model's own cache holds keys; where that is not known, it counts as if it did."""
    try:
        cache = dense.new_cache(codes=False)
        dense.call(x, cache=cache)
        layers = getattr(cache, "self_attention_cache", cache).layers
        return any(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers)
    except Exception:  # a model's own limits
        return "attention" in str([type(module).__name__.lower() for module in dense.model.modules()])


def _small(dense: Subject, window: int, said: list[str]) -> Subject:
    policy = KVPolicy(bits_per_value=4, window=window, sinks=2, chunk=8, codebook_size=16, codebook_dim=4, beam=1)
    batch: dict[str, Any] = {
        **dense.encoder_inputs(2),
        ("decoder_input_ids" if dense.both else "input_ids"): tokens(9, 2, _LENGTH),
    }
    batch["use_cache"] = False  # FSMT hides later tokens of a whole sequence without one alone
    small = rpqfx.quantize_kv(
        dense.model,
        policy,
        calibration=[batch],
        fit=False,
        seed=0,
        progress=lambda done, total, what: said.append(what),
    )
    return Subject(dense.one, small.eval())


def _runs(
    dense: Subject, wide: Subject, small: Subject, x: Tensor, wanted: Tensor
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Yields the checks; those of caches are left out where the dense model's own cache does not do the same."""
    yield "dense", lambda: _apart(wide.call(x), wanted, _TO_DENSE)
    able = {name: _able(dense, x, wanted, sizes) for name, sizes in _SIZES.items()}
    whole = small.call(x)
    for name, sizes in _SIZES.items():
        yield (
            name,
            lambda name=name, sizes=sizes: _if(  # type: ignore[misc]
                able[name], lambda: _apart(small.parts(x, sizes), whole, _TO_ITSELF)
            ),
        )
    yield "padding", lambda: _padding(dense, wide, small, x)
    yield "turns", lambda: _if(able["parts"], lambda: _two_turns(dense, small, x))
    yield "beams", lambda: _if(able["tokens"], lambda: _beams(dense, wide, small, x))
    yield "copies", lambda: _if(able["cache"] or able["tokens"], lambda: _copies(small, x, whole))


_SIZES = {"cache": [_PROMPT] + [1] * (_LENGTH - _PROMPT), "tokens": [1] * _LENGTH, "parts": [5, 9, 10]}


def _able(dense: Subject, x: Tensor, wanted: Tensor, sizes: list[int]) -> str:
    """Returns why the dense model cannot do with its own cache what is asked of one of codes, or ``""``."""
    try:
        found = _apart(dense.parts(x, sizes, codes=False), wanted, _TO_ITSELF)
    except Exception as error:  # a model's own limits
        return f"dense: {type(error).__name__}"
    return "" if found["state"] == "ok" else f"dense: off by {found['error']:.0e}"


def _if(unable: str, run: Callable[[], Result]) -> Result:
    return {"state": "n/a", "detail": unable} if unable else run()


def _padding(dense: Subject, wide: Subject, small: Subject, x: Tensor) -> Result:
    """A row padded on the left: as the dense model does, and in parts as whole."""
    mask = torch.ones_like(x)
    mask[1, :5] = 0
    if dense.both:
        return {"state": "n/a", "detail": "decoders are not padded on the left"}
    try:
        wanted = dense.call(x, mask)
    except Exception as error:  # a model's own limits
        return {"state": "n/a", "detail": f"dense: {type(error).__name__}"}
    seen = mask.bool()
    found = _apart(wide.call(x, mask)[seen], wanted[seen], _TO_DENSE)
    if found["state"] != "ok":
        return found
    try:
        stepped = dense.parts(x, _SIZES["cache"], codes=False, mask=mask)
    except Exception as error:
        return {"state": "n/a", "detail": f"dense: {type(error).__name__}"}
    own = _apart(stepped[seen], dense.parts(x, [_LENGTH], codes=False, mask=mask)[seen], _TO_ITSELF)
    if own["state"] != "ok":
        return {"state": "n/a", "detail": f"dense: off by {own['error']:.0e}"}
    whole = small.parts(x, [_LENGTH], mask=mask)
    return _apart(small.parts(x, _SIZES["cache"], mask=mask)[seen], whole[seen], _TO_ITSELF)


def _two_turns(dense: Subject, small: Subject, x: Tensor) -> Result:
    """The second turn of a conversation, with the first one's cache, against all of it afresh."""
    # generate of some models with an encoder goes on otherwise with a cache than afresh, for most prompts
    for prompt in (x, *(tokens(seed, *x.shape) for seed in ((2, 3, 4) if dense.both else ()))):
        try:
            same = torch.equal(*_second_turn(dense, prompt, codes=False))
        except Exception as error:  # a model's own limits
            return {"state": "n/a", "detail": f"dense: {type(error).__name__}"}
        if not same:
            return {"state": "n/a", "detail": "dense: other tokens"}
    return _equal(*_second_turn(small, x, codes=True))


def _second_turn(subject: Subject, x: Tensor, codes: bool) -> tuple[Tensor, Tensor]:
    name, cache = subject.cache_name, subject.new_cache(codes)
    first = subject.generate(x[:, :_PROMPT], max_new_tokens=_NEW, **{name: cache})
    more = torch.cat([first, x[:, _PROMPT:]], 1)
    again = [subject.generate(more, max_new_tokens=_NEW, **{name: one}) for one in (cache, subject.new_cache(codes))]
    return again[0], again[1]


def _beams(dense: Subject, wide: Subject, small: Subject, x: Tensor) -> Result:
    """Beams with a wide window as the dense model's, and with a cache of codes as without any cache."""
    options = {"max_new_tokens": _NEW, "num_beams": 3}
    prompt = x[:, :_PROMPT]
    try:
        wanted = dense.generate(prompt, **options)
    except Exception as error:  # a model's own limits
        return {"state": "n/a", "detail": f"dense: {type(error).__name__}"}
    found = _equal(wide.generate(prompt, **options), wanted)
    if found["state"] != "ok":
        return found
    return _equal(small.generate(prompt, **options), small.generate(prompt, use_cache=False, **options))


def _copies(small: Subject, x: Tensor, whole: Tensor) -> Result:
    """A copied and a pickled model, each with a copy of a cache that is half full."""
    for twin in (copy.deepcopy(small.model), pickle.loads(pickle.dumps(small.model))):
        other = Subject(small.one, twin)
        cache = small.new_cache(codes=True)
        small.call(x[:, :_PROMPT], cache=cache)
        found = _apart(other.call(x), whole, _TO_ITSELF)
        if found["state"] != "ok":
            return found
        copied = copy.deepcopy(cache)
        rest = [other.call(other.coming(x, i, i + 1), cache=copied) for i in range(_PROMPT, _LENGTH)]
        found = _apart(torch.cat(rest, 1), whole[:, _PROMPT:], _TO_ITSELF)
        if found["state"] != "ok":
            return found
    return found


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def _apart(found: Tensor, wanted: Tensor, bound: float) -> Result:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return {"state": "ok" if error < bound else "failed", "error": error}


def _equal(found: Tensor, wanted: Tensor) -> Result:
    return {"state": "ok" if torch.equal(found, wanted) else "failed", "detail": "other tokens"}


def _outcome(run: Callable[[], Result]) -> Result:
    try:
        return run()
    except Exception as error:  # whatever it raises is the finding
        return {"state": "failed", "detail": f"{type(error).__name__}: {error}"[:300]}
