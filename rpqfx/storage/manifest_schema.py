"""The schema of a manifest, by its keys: types and ranges, in plain code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from rpqfx.codebook.packed_tiles import IN_TILES
from rpqfx.codebook.spec import MAX_ENTRIES
from rpqfx.graph.operands import Copies
from rpqfx.nn.weight import ReadAs
from rpqfx.ops import PLANS
from rpqfx.storage.pickle_reader import DTYPES
from rpqfx.storage.recipe import is_recipe

_LARGEST = 2**48
SLOTS = 2**20  # codes of a token in a cache, at most

Check = Callable[[Any], bool]


class _Keys:
    """The keys that a dict has, and a check of each value; a key that begins with ``?`` may be missing."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._needed = [key for key in checks if not key.startswith("?")]
        self._checks = {key.lstrip("?"): check for key, check in checks.items()}

    def wrong(self, value: Any) -> str | None:
        """Returns the key that is missing, not known or has no value that it may have; "" for what is no dict."""
        if type(value) is not dict:
            return ""
        for key in self._needed:
            if key not in value:
                return key
        for key, held in value.items():
            check = self._checks.get(key)
            if check is None or not check(held):
                return str(key)
        return None

    def __call__(self, value: Any) -> bool:
        return self.wrong(value) is None


def _whole(least: int, most: int = _LARGEST) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _one_of(*values: Any) -> Check:
    known = {(type(value), value) for value in values}  # 1 and True are equal, and not the same
    kinds = {kind for kind, _ in known}
    return lambda value: type(value) in kinds and (type(value), value) in known


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, least: int = 0) -> Check:
    return lambda value: type(value) is list and len(value) >= least and all(map(check, value))


def _is_name(value: Any) -> bool:
    """Returns whether something is a qualified name: parts with a dot between, none of them empty."""
    return type(value) is str and all(value.split("."))


def _is_path(value: Any) -> bool:
    """Returns whether something is the name of a module; the model's own is empty."""
    return value == "" or _is_name(value)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST)


_NAMES = _list_of(_is_name, 1)
_SHAPE = _list_of(_whole(0))
_ENTRIES = _whole(2, MAX_ENTRIES)
_IS_DTYPE = _one_of(*DTYPES)

_SPEC = _Keys({
    "num_vectors": _whole(1), "dim": _whole(1), "codebook_dim": _whole(1), "entries": _ENTRIES, "stages": _whole(1),
    "num_codebooks": _whole(1), "scale": _is_flag, "signs": _is_flag, "grad_scale": _one_of("sum", "sqrt", "mean"),
    "?column_scale_group": _whole(0), "?tiled": _is_flag,
})  # fmt: skip
_LAYOUT = _Keys({
    "shape": _list_of(_whole(1), 1), "lead": _whole(0), "transposed": _is_flag, "zero_vector": _or_none(_whole(0)),
    "experts": _one_of(None, "shared", "own"),
})  # fmt: skip
_PACKED = _Keys({"bits": _whole(1, 16), "entries": _ENTRIES, "?order": _one_of(IN_TILES)})
_ENTRY = _Keys({
    "names": _NAMES, "kind": _one_of("parameter", "buffer", "attribute"), "shape": _SHAPE, "dtype": _IS_DTYPE,
    "requires_grad": _is_flag, "?packed": _PACKED, "?stored": _IS_DTYPE, "?drawn": _list_of(_whole(0), 1),
})  # fmt: skip
_SITE = _Keys({
    "names": _NAMES, "spec": _SPEC,
    "layout": _LAYOUT, "std": _is_number, "plan": _one_of(*PLANS),
    "read_as": _one_of(*get_args(ReadAs)), "plain_when_compiled": _is_flag, "shares_codebooks": _is_flag,
})  # fmt: skip
_RECORD = _Keys({
    "name": _is_name, "names": _NAMES, "kind": _is_text, "module_type": _is_text, "shape": _list_of(_whole(0)),
    "spec": _or_none(_SPEC), "split": _one_of(None, "row", "column"),
    "init": _or_none(_is_text), "reason": _or_none(_is_text), "error": _or_none(_is_number), "before": _whole(0),
    "after": _whole(0), "shared": _whole(0), "plan": _one_of(*PLANS), "stored_code_bits": _whole(0),
    "stored_codebook_bits": _whole(0), "stored_scale_bits": _whole(0), "?drawn_stages": _whole(0),
})  # fmt: skip
_CODER = _Keys({
    "heads": _whole(1), "dim": _whole(1), "codebook_dim": _whole(1), "codebook_size": _ENTRIES,
    "stages": _list_of(_whole(0, SLOTS), 1), "transform": _is_flag, "joint": _is_flag, "strided": _is_flag,
    "normalize": _is_flag, "use_cosine_sim": _is_flag, "beam": _whole(1, 2**16), "decay": _or_none(_is_number),
    "fine": _whole(0),
})  # fmt: skip
_ROTARY_CONVENTIONS = [
    [angles, pairs] for angles in ("halves", "interleaved", "single") for pairs in ("halves", "interleaved")
]
_OPERAND = _Keys({
    "number": _whole(1), "width": _whole(1),
    "heads": _or_none(_whole(1)), "copies": _whole(1), "order": _one_of(*get_args(Copies)),
})  # fmt: skip
_PRODUCTS = _Keys({
    "scores": _whole(0), "mix": _whole(0), "total": _whole(1), "keys": _OPERAND, "values": _OPERAND,
})  # fmt: skip
_CACHE = _Keys({
    "names": _list_of(_is_path, 1), "kind": _one_of("call", "torch", "transformers", "latent", "products"),
    "outermost": _is_flag, "policy": _is_text,
    "?rotary_convention": _or_none(lambda value: value in _ROTARY_CONVENTIONS), "?products": _or_none(_PRODUCTS),
    "keys": _CODER, "values": _CODER,
})  # fmt: skip
_WHOLE = _Keys({
    "version": _one_of(1), "tensors": _list_of(_ENTRY),
    "sites": _list_of(_SITE),
    "records": _list_of(_RECORD), "notes": _list_of(_is_text),
    "checksum": _is_text, "?kv": _list_of(_CACHE), "?routed": _list_of(_is_text),
    "?build": is_recipe,
})  # fmt: skip


def wrong_at(manifest: Any) -> str | None:
    """Returns what is wrong with a manifest by itself; None where each value is one that it may have.

    Args:
        manifest: The manifest as read from JSON.
    """
    wrong = _WHOLE.wrong(manifest)
    return None if wrong is None else _told(manifest, wrong)


def _told(value: Any, key: str) -> str:
    """Returns the place in a manifest where something is wrong, as a person would look for it."""
    inner = {"tensors": _ENTRY, "sites": _SITE, "records": _RECORD, "kv": _CACHE, "spec": _SPEC, "layout": _LAYOUT,
             "keys": _CODER, "values": _CODER}  # fmt: skip
    path = []
    while type(value) is dict and key:
        path.append(key)
        value, known = value.get(key), inner.get(key)
        if type(value) is list and known is not None:
            at = next((number for number, item in enumerate(value) if not known(item)), None)
            if at is None:
                break
            path.append(str(at))
            value = value[at]
        if known is None:
            break
        key = known.wrong(value) or ""
    seen = repr(value)
    return f"its manifest has no right value at {' / '.join(path) or 'its top'}: {seen[:80]}"
