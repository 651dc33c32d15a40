"""Checks a manifest before anything is built from it.

A manifest may come from anywhere, with a seal that fits. Each value is held against its type and its range, and each
size against the tensors that the file has, whose bytes are there; so nothing that is made from a manifest that passed
is larger than the file accounts for. Codes that are drawn from a seed are the exception: they take no more than eight
bytes for each element of their weight, and are drawn once the model that the file is for is known to have that weight.
Nothing is built or allocated here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rpqfx.codebook.drawn_codes import may_be_seed
from rpqfx.codebook.packing import code_bits, packed_bytes
from rpqfx.codebook.spec import CodebookSpec
from rpqfx.codebook.stored_codes import stored_bytes
from rpqfx.codebook.tiles import MOST_ENTRIES
from rpqfx.errors import FormatError, RPQError, SpecError
from rpqfx.nn.hosting.backed import SUFFIX
from rpqfx.storage.manifest_schema import SLOTS, wrong_at
from rpqfx.storage.pickle_reader import DTYPES

Stored = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def check_manifest(manifest: Any, stored: Stored) -> None:
    """Raises unless a manifest is one that ``describe`` could have made of a file's tensors.

    Args:
        manifest: The manifest as read from JSON.
        stored: Dtype and shape of each tensor that is in the file, by name.

    Raises:
        FormatError: Says the first thing that is not as it has to be.
    """
    if (wrong := wrong_at(manifest)) is not None:
        raise FormatError(wrong)
    entries = _entries(manifest["tensors"], stored)
    held: set[str] = set()
    codes = {f"{name}{SUFFIX}.codes" for site in manifest["sites"] for name in site["names"]}
    for entry in manifest["tensors"]:
        if "drawn" in entry and entry["names"][0] not in codes:
            raise FormatError(f"its manifest says that {entry['names'][0]}, which is no codes, is drawn from a seed")
    for site in manifest["sites"]:
        _fresh(site["names"], held)
        _check_site(site, entries)
    for record in manifest["records"]:
        _check_record(record)
    for cache in manifest.get("kv", ()):
        _fresh(cache["names"], held)
        for side in ("keys", "values"):
            _check_coder(f"{cache['names'][0]}.kv_codes.{side}".lstrip("."), cache[side], entries)


def _fresh(names: Iterable[str], seen: set[str]) -> None:
    for name in names:
        if name in seen:
            raise FormatError(f"its manifest names {name} twice")
        seen.add(name)


def _entries(tensors: list[dict[str, Any]], stored: Stored) -> dict[str, dict[str, Any]]:
    """Returns the entries of a manifest by all names of their tensors, each held against what is in the file."""
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
    if "drawn" in entry and not _has_drawn_stages(entry):
        raise FormatError(f"it holds {name}, which cannot be drawn: its manifest names no stages of codes")
    if "packed" in entry:
        entries, bits = entry["packed"]["entries"], entry["packed"]["bits"]
        plain = "stored" not in entry and not (wanted.is_floating_point or wanted.is_complex or wanted is torch.bool)
        plain = plain and not ("order" in entry["packed"] and (len(entry["shape"]) != 3 or entries > MOST_ENTRIES))
        if bits != code_bits(entries) or not plain or torch.iinfo(wanted).max < entries - 1:
            raise FormatError(f"it holds {name}, which cannot be unpacked: its manifest says no way to do so")
        size = packed_size(entry)
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


def packed_size(entry: Mapping[str, Any]) -> int:
    """Returns the bytes that a packed tensor takes in a file.

    Args:
        entry: Its entry in the manifest, checked as far as that goes without the file.
    """
    shape, entries = entry["shape"], entry["packed"]["entries"]
    if "drawn" in entry:
        return stored_bytes(shape, entries, len(entry["drawn"]))
    return packed_bytes(math.prod(shape), entries)


def _has_drawn_stages(entry: dict[str, Any]) -> bool:
    stages, shape = entry["drawn"], entry["shape"]
    return "packed" in entry and len(shape) == 3 and stages == sorted(set(stages)) and stages[-1] < shape[0]


def _check_site(site: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    name, spec, layout = site["names"][0], site["spec"], site["layout"]
    _check_spec(name, spec)
    parts = spec["dim"] // spec["codebook_dim"]
    codes = (spec["stages"], parts, spec["num_vectors"])
    wanted: dict[str, tuple[int, ...]] = {
        "codebooks": (spec["stages"], spec["num_codebooks"], spec["entries"], spec["codebook_dim"]),
        "codes": codes,
    }
    if spec["scale"]:
        wanted["scale"] = (spec["num_vectors"],)
    if spec.get("column_scale_group"):
        wanted["column_scale"] = (spec["dim"] // spec["column_scale_group"],)
    if spec["signs"]:
        wanted["signs"] = (*codes[:2], -(-codes[2] // 8))
    for part, shape in wanted.items():
        entry = _entry_of(entries, [f"{other}{SUFFIX}.{part}" for other in site["names"]], shape)
        dtype = DTYPES[entry["dtype"]]
        packed = entry.get("packed", {}).get("entries", 0)
        right = not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool) and packed <= spec["entries"]
        if part == "signs":
            right = dtype is torch.uint8 and not packed
        if "drawn" in entry:
            known = CodebookSpec.from_dict(spec)
            right = part == "codes" and packed == known.entries and dtype is known.code_dtype and may_be_seed(known)
        if part in ("codebooks", "scale", "column_scale"):
            right = dtype.is_floating_point
        if not right or (entry["kind"] == "parameter") != (part in ("codebooks", "scale", "column_scale")):
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
    try:
        CodebookSpec.from_dict(spec)
    except SpecError as error:
        raise FormatError(f"its manifest says that {name} has codebooks that cannot be: {error}") from error


def _check_record(record: dict[str, Any]) -> None:
    if record["spec"] is not None:
        _check_spec(record["name"], record["spec"])
        if not math.prod(record["shape"]):
            raise FormatError(f"its manifest says that {record['name']}, of no elements, is quantized")


def _entry_of(entries: dict[str, dict[str, Any]], names: list[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the entry of a tensor under all of these names, which has this shape."""
    found = [entries.get(name) for name in names]
    if found[0] is None:
        raise FormatError(f"its manifest lacks {names[0]}")
    if any(entry is not found[0] for entry in found):
        raise FormatError(f"its manifest says that {', '.join(names)} are one tensor, and then that they are not")
    if tuple(found[0]["shape"]) != shape:
        raise FormatError(f"its manifest has {names[0]} of shape {tuple(found[0]['shape'])}, expected {shape}")
    return found[0]


def _check_coder(name: str, coder: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
    heads, dim, d, stages = coder["heads"], coder["dim"], coder["codebook_dim"], coder["stages"]
    parts = 1 if coder["joint"] else heads
    width, inner = heads * dim // parts, len(stages) * d // parts
    divides = width % d == 0 and len(stages) % parts == 0 and (not coder["strided"] or dim % d == 0)
    if not divides or sum(stages) > SLOTS or (coder["transform"] and coder["strided"]):
        raise FormatError(f"its manifest says that {name} codes in numbers that do not go together")
    if coder["joint"] and (coder["normalize"] or not coder["transform"]):
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
    if len(shape) != 4 or shape[0] < max(stages) or shape[1:] != (1, coder["codebook_size"], d):
        raise FormatError(f"its manifest has no codebooks of {coder['codebook_size']} entries of {d} for {name}")
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
        error: The error that ``check_manifest`` raised.
    """
    why = str(error).removeprefix("its manifest ")
    return RPQError(
        f"this model could not be loaded again, so it is not saved: {why}. Tensors of codebooks that are computed from "
        "others (parametrised, pruned) or sharded have to be made plain first"
    )
