"""What a manifest has to be before anything is built from it.

A manifest may come from anywhere, with a seal that fits. Each value is held against its type and its range, and each
size against the tensors that the file has, whose bytes are there; so nothing that is made from a manifest that passed
is larger than the file accounts for. Nothing is built or allocated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch

from rpqfx.archive import DTYPES
from rpqfx.errors import FormatError, RPQError
from rpqfx.nn.backed import SUFFIX
from rpqfx.nn.weight import ReadAs
from rpqfx.ops import PLANS
from rpqfx.packing import code_bits, packed_bytes
from rpqfx.spec import MAX_ENTRIES

_LARGEST = 2**48
_SLOTS = 2**20  # codes of a token in a cache, at most

Check = Callable[[Any], bool]
Stored = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _whole(least: int, most: int = _LARGEST) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _one_of(*values: Any) -> Check:
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, least: int = 0) -> Check:
    return lambda value: type(value) is list and len(value) >= least and all(map(check, value))


def _is_name(value: Any) -> bool:
    """Whether something is a qualified name: parts with a dot between, none of them empty."""
    return type(value) is str and all(value.split("."))


def _is_path(value: Any) -> bool:
    """Whether something is the name of a module; the model's own is empty."""
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

_SPEC: dict[str, Check] = {
    "num_vectors": _whole(1), "dim": _whole(1), "codebook_dim": _whole(1), "entries": _ENTRIES, "stages": _whole(1),
    "books": _whole(1), "scale": _is_flag, "signs": _is_flag, "grad_scale": _one_of("sum", "sqrt", "mean"),
    "?dim_scale": _whole(0),
}  # fmt: skip
_LAYOUT: dict[str, Check] = {
    "shape": _list_of(_whole(1), 1), "lead": _whole(0), "transposed": _is_flag, "zero_vector": _or_none(_whole(0)),
    "?experts": _one_of(None, "shared", "own"),
}  # fmt: skip
_PACKED: dict[str, Check] = {"bits": _whole(1, 16), "entries": _ENTRIES}
_ENTRY: dict[str, Check] = {
    "names": _NAMES, "kind": _one_of("parameter", "buffer", "attribute"), "shape": _SHAPE, "dtype": _IS_DTYPE,
    "requires_grad": _is_flag, "?packed": lambda value: _wrong(value, _PACKED) is None, "?stored": _IS_DTYPE,
}  # fmt: skip
_SITE: dict[str, Check] = {
    "names": _NAMES, "spec": lambda value: _wrong(value, _SPEC) is None,
    "layout": lambda value: _wrong(value, _LAYOUT) is None, "std": _is_number, "?plan": _one_of(*PLANS),
    "?read_as": _one_of(*get_args(ReadAs)), "?plain_when_compiled": _is_flag, "?shares_codebooks": _is_flag,
}  # fmt: skip
_RECORD: dict[str, Check] = {
    "name": _is_name, "names": _NAMES, "kind": _is_text, "module_type": _is_text, "shape": _list_of(_whole(0)),
    "spec": _or_none(lambda value: _wrong(value, _SPEC) is None), "?split": _one_of(None, "row", "column"),
    "?init": _or_none(_is_text), "?reason": _or_none(_is_text), "?error": _or_none(_is_number), "?before": _whole(0),
    "?after": _whole(0), "?shared": _whole(0), "?plan": _one_of(*PLANS), "?code_bits": _whole(0),
    "?codebook_bits": _whole(0), "?scale_bits": _whole(0),
}  # fmt: skip
_CODER: dict[str, Check] = {
    "heads": _whole(1), "dim": _whole(1), "sub_vector": _whole(1), "entries": _ENTRIES,
    "stages": _list_of(_whole(0, _SLOTS), 1), "transform": _is_flag, "joint": _is_flag, "strided": _is_flag,
    "scaled": _is_flag, "cosine": _is_flag, "beam": _whole(1, 2**16), "decay": _or_none(_is_number), "fine": _whole(0),
}  # fmt: skip
_CACHE: dict[str, Check] = {
    "names": _list_of(_is_path, 1), "kind": _one_of("call", "torch", "transformers"), "outermost": _is_flag,
    "policy": _is_text,
    "keys": lambda value: _wrong(value, _CODER) is None, "values": lambda value: _wrong(value, _CODER) is None,
}  # fmt: skip
_WHOLE: dict[str, Check] = {
    "version": _whole(1, 2**31), "tensors": _list_of(lambda value: _wrong(value, _ENTRY) is None),
    "sites": _list_of(lambda value: _wrong(value, _SITE) is None),
    "records": _list_of(lambda value: _wrong(value, _RECORD) is None), "notes": _list_of(_is_text),
    "checksum": _is_text, "?kv": _list_of(lambda value: _wrong(value, _CACHE) is None), "?routed": _list_of(_is_text),
}  # fmt: skip


def check_manifest(manifest: Any, stored: Stored) -> None:
    """Raises unless a manifest is one that ``describe`` could have made of a file's tensors.

    Args:
        manifest: What JSON gave.
        stored: Dtype and shape of each tensor that is in the file, by name.

    Raises:
        FormatError: Says the first thing that is not as it has to be.
    """
    if (wrong := _wrong(manifest, _WHOLE)) is not None:
        raise FormatError(_told(manifest, wrong))
    entries = _entries(manifest["tensors"], stored)
    held: set[str] = set()
    for site in manifest["sites"]:
        _fresh(site["names"], held)
        _check_site(site, entries)
    for record in manifest["records"]:
        _check_record(record)
    for cache in manifest.get("kv", ()):
        _fresh(cache["names"], held)
        for side in ("keys", "values"):
            _check_coder(f"{cache['names'][0]}.kv_codes.{side}".lstrip("."), cache[side], entries)


def _wrong(value: Any, known: Mapping[str, Check]) -> str | None:
    """The key of a dict that is missing, not known or has no value that it may have; "" for what is no dict."""
    if type(value) is not dict:
        return ""
    needed = {key for key in known if not key.startswith("?")}
    checks = {key.lstrip("?"): check for key, check in known.items()}
    for key in (*needed, *value):
        if key not in value or key not in checks or not checks[key](value[key]):
            return key
    return None


def _told(value: Any, key: str) -> str:
    """Where in a manifest something is wrong, as a person would look for it."""
    inner = {"tensors": _ENTRY, "sites": _SITE, "records": _RECORD, "kv": _CACHE, "spec": _SPEC, "layout": _LAYOUT,
             "keys": _CODER, "values": _CODER}  # fmt: skip
    path = []
    while type(value) is dict and key:
        path.append(key)
        value, known = value.get(key), inner.get(key)
        if type(value) is list and known is not None:
            at = next((number for number, item in enumerate(value) if _wrong(item, known) is not None), None)
            if at is None:
                break
            path.append(str(at))
            value = value[at]
        if known is None:
            break
        key = _wrong(value, known) or ""
    seen = repr(value)
    return f"its manifest has no right value at {' / '.join(path) or 'its top'}: {seen[:80]}"


def _fresh(names: Iterable[str], seen: set[str]) -> None:
    for name in names:
        if name in seen:
            raise FormatError(f"its manifest names {name} twice")
        seen.add(name)


def _entries(tensors: list[dict[str, Any]], stored: Stored) -> dict[str, dict[str, Any]]:
    """The entries of a manifest by all names of their tensors, each held against what is in the file."""
    entries: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for entry in tensors:
        _fresh(entry["names"], seen)
        entries |= dict.fromkeys(entry["names"], entry)
        first = entry["names"][0]
        if first not in stored:
            raise FormatError(f"its manifest names {first}, which is not among its tensors")
        _check_stored(first, entry, *stored[first])
    more = set(stored) - {entry["names"][0] for entry in tensors}
    if more:
        raise FormatError(f"its tensor {min(more)!r} is not in its manifest")
    return entries


def _check_stored(name: str, entry: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wanted, count = DTYPES[entry["dtype"]], math.prod(entry["shape"])
    if "packed" in entry:
        entries, bits = entry["packed"]["entries"], entry["packed"]["bits"]
        plain = "stored" not in entry and not (wanted.is_floating_point or wanted.is_complex or wanted is torch.bool)
        if bits != code_bits(entries) or not plain or torch.iinfo(wanted).max < entries - 1:
            raise FormatError(f"it holds {name}, which cannot be unpacked: its manifest says no way to do so")
        size = packed_bytes(count, entries)
        if dtype is not torch.uint8 or shape != (size,):
            raise FormatError(
                f"it holds {name}, which cannot be unpacked: {count} codes of {bits} bits take {size} bytes, got "
                f"{shape} of {dtype}"
            )
        return
    narrow = DTYPES[entry["stored"]] if "stored" in entry else wanted
    widened = narrow.is_floating_point and wanted.is_floating_point and narrow.itemsize <= wanted.itemsize
    if narrow is not dtype or not (narrow is wanted or widened) or tuple(entry["shape"]) != shape:
        raise FormatError(
            f"it holds {name} as {shape} of {dtype}, its manifest says {tuple(entry['shape'])} of {wanted}"
        )
    if entry["requires_grad"] and not (wanted.is_floating_point or wanted.is_complex):
        raise FormatError(f"its manifest says that {name}, of {wanted}, has a gradient")


def _check_site(site: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    name, spec, layout = site["names"][0], site["spec"], site["layout"]
    _check_spec(name, spec)
    parts = spec["dim"] // spec["codebook_dim"]
    codes = (spec["stages"], parts, spec["num_vectors"])
    wanted: dict[str, tuple[int, ...]] = {
        "codebooks": (spec["stages"], spec["books"], spec["entries"], spec["codebook_dim"]),
        "codes": codes,
    }
    if spec["scale"]:
        wanted["scale"] = (spec["num_vectors"],)
    if spec.get("dim_scale"):
        wanted["dim_scale"] = (spec["dim"] // spec["dim_scale"],)
    if spec["signs"]:
        wanted["signs"] = (*codes[:2], -(-codes[2] // 8))
    for part, shape in wanted.items():
        entry = _entry_of(entries, [f"{other}{SUFFIX}.{part}" for other in site["names"]], shape)
        dtype = DTYPES[entry["dtype"]]
        packed = entry.get("packed", {}).get("entries", 0)
        right = not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool) and packed <= spec["entries"]
        if part == "signs":
            right = dtype is torch.uint8 and not packed
        if part in ("codebooks", "scale", "dim_scale"):
            right = dtype.is_floating_point
        if not right or (entry["kind"] == "parameter") != (part in ("codebooks", "scale", "dim_scale")):
            raise FormatError(f"its manifest says that {name} has {part} of {dtype}, a {entry['kind']}")
    _check_layout(name, layout, spec)


def _check_layout(name: str, layout: dict[str, Any], spec: dict[str, Any]) -> None:
    shape, experts = layout["shape"], layout.get("experts")
    lead = layout["lead"]
    if lead >= max(len(shape), 2) or (experts and len(shape) != 3):
        raise FormatError(f"its manifest says that {name} of shape {tuple(shape)} has {lead} axes for rows")
    sizes = [math.prod(shape[:lead]), math.prod(shape[lead:])] if not experts else shape[1:]
    vectors, dim = reversed(sizes) if layout["transposed"] else sizes
    if experts:
        vectors, dim = (vectors * shape[0], dim) if experts == "shared" else (vectors, dim * shape[0])
    if (vectors, dim) != (spec["num_vectors"], spec["dim"]):
        raise FormatError(
            f"its manifest says that {name} of shape {tuple(shape)} is {spec['num_vectors']} vectors of "
            f"{spec['dim']}, which it is not"
        )
    if experts == "own" and (dim // shape[0]) % spec["codebook_dim"]:
        raise FormatError(f"its manifest says that sub-vectors of {name} reach from expert to expert")
    if layout["zero_vector"] is not None and layout["zero_vector"] >= vectors:
        raise FormatError(f"its manifest says that vector {layout['zero_vector']} of {name} is zero; it has {vectors}")


def _check_spec(name: str, spec: dict[str, Any]) -> None:
    parts, dim_scale = spec["dim"] // spec["codebook_dim"], spec.get("dim_scale", 0)
    if spec["dim"] % spec["codebook_dim"] or parts % spec["books"] or (dim_scale and spec["dim"] % dim_scale):
        raise FormatError(f"its manifest says that {name} is held in numbers that do not divide")


def _check_record(record: dict[str, Any]) -> None:
    if record["spec"] is not None:
        _check_spec(record["name"], record["spec"])
        if not math.prod(record["shape"]):
            raise FormatError(f"its manifest says that {record['name']}, of no elements, is in codebooks")


def _entry_of(entries: dict[str, dict[str, Any]], names: list[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """The entry of a tensor under all of these names, which has this shape."""
    found = [entries.get(name) for name in names]
    if found[0] is None:
        raise FormatError(f"its manifest lacks {names[0]}")
    if any(entry is not found[0] for entry in found):
        raise FormatError(f"its manifest says that {', '.join(names)} are one tensor, and then that they are not")
    if tuple(found[0]["shape"]) != shape:
        raise FormatError(f"its manifest has {names[0]} of shape {tuple(found[0]['shape'])}, expected {shape}")
    return found[0]


def _check_coder(name: str, coder: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    heads, dim, d, stages = coder["heads"], coder["dim"], coder["sub_vector"], coder["stages"]
    parts = 1 if coder["joint"] else heads
    width, inner = heads * dim // parts, len(stages) * d // parts
    divides = width % d == 0 and len(stages) % parts == 0 and (not coder["strided"] or dim % d == 0)
    if not divides or sum(stages) > _SLOTS or (coder["transform"] and coder["strided"]):
        raise FormatError(f"its manifest says that {name} codes in numbers that do not go together")
    if coder["joint"] and (coder["scaled"] or not coder["transform"]):
        raise FormatError(f"its manifest says that heads of {name} share codes, which takes a map and no scale")
    if coder["transform"]:
        _entry_of(entries, [f"{name}.mean"], (heads, dim))
        for way in ("analysis", "synthesis"):
            _entry_of(entries, [f"{name}.{way}.values"], (parts, inner, width))
            _entry_of(entries, [f"{name}.{way}.rest"], (parts, coder["fine"], width))
            _entry_of(entries, [f"{name}.{way}.scale"], (parts, inner))
    elif len(stages) * d != heads * dim or coder["fine"]:
        raise FormatError(f"its manifest says that {name} codes other channels than it has")
    books = entries.get(f"{name}.quantizer.codebooks")
    shape = () if books is None else tuple(books["shape"])
    if len(shape) != 4 or shape[0] < max(stages) or shape[1:] != (1, coder["entries"], d):
        raise FormatError(f"its manifest has no codebooks of {coder['entries']} entries of {d} for {name}")
    if coder["decay"] is None:
        return
    sums = entries.get(f"{name}.quantizer.ema_sums")
    size = () if sums is None else tuple(sums["shape"])  # of as many stages as this coder has, at least
    if size[1:] != shape[1:] or size[0] < max(stages):
        raise FormatError(f"its manifest has no averages of {shape} for {name}")
    for part, own in (("ema_counts", size[:-1]), ("ema_steps", ())):
        _entry_of(entries, [f"{name}.quantizer.{part}"], own)


def as_unsavable(error: FormatError) -> RPQError:
    """Returns what ``save`` raises where a model's manifest would be refused.

    Args:
        error: What ``check_manifest`` raised.
    """
    why = str(error).removeprefix("its manifest ")
    return RPQError(
        f"this model could not be loaded again, so it is not saved: {why}. Tensors of codebooks that are computed from "
        "others (parametrised, pruned) or sharded have to be made plain first"
    )
