"""Codes in a file: packed, or where they were drawn and never changed, the seed from which they are drawn again.

The tensor of codes of which some stages were drawn begins with the eight bytes of their seed, lowest first; the packed
codes of all other stages follow. The manifest says which stages these are, which version of the generator draws them,
and a sum over them, so that a platform that drew others would be found out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rpqfx.codebook.counter_random import SEEDS
from rpqfx.codebook.packing import code_bits, pack_codes, packed_bytes, unpack_codes
from rpqfx.codebook.spec import code_dtype
from rpqfx.errors import CodeError, FormatError, RPQError
from rpqfx.nn.drawn_codes import SEED_BYTES, VERSION, balanced_codes, stored_bytes
from rpqfx.nn.weight import RPQWeight
from rpqfx.storage.files import bytes_of


def packed(name: str, codes: Tensor, weight: RPQWeight) -> tuple[Tensor, dict[str, Any]]:
    """Returns codes as a file holds them, and what its manifest says of them.

    Args:
        name: Name of the tensor, for messages.
        codes: ``[R, M, N]``, with values.
        weight: The weight that they are of.

    Raises:
        CodeError: If codes point outside their codebook.
    """
    entries, drawn = weight.spec.entries, weight.drawn_stages()
    said: dict[str, Any] = {"packed": {"bits": code_bits(entries), "entries": entries}}
    try:
        if not drawn:
            return pack_codes(codes, entries), said
        others = [stage for stage in range(len(codes)) if stage not in drawn]
        rest = [pack_codes(codes[others], entries)] if others else []
    except CodeError as error:
        raise CodeError(f"{name} holds {error}") from error
    said["drawn"] = {"version": VERSION, "stages": list(drawn), "sum": _sum(codes, drawn, entries)}
    assert weight.code_seed is not None
    seed = list(weight.code_seed.to_bytes(SEED_BYTES, "little"))
    return torch.cat([torch.tensor(seed, dtype=torch.uint8, device=codes.device), *rest]), said


def unpacked(entry: Mapping[str, Any], stored: Tensor) -> tuple[Tensor, int]:
    """Returns codes of which some stages were drawn, all of them, and their seed.

    Call it once a model is known to have a weight of that size: the codes may be much larger than the file.

    Args:
        entry: Their entry in the manifest, checked.
        stored: As they are in the file; on the device where the codes go.

    Raises:
        FormatError: If these are not the codes that were saved.
    """
    shape, entries, said = entry["shape"], entry["packed"]["entries"], entry["drawn"]
    seed = int.from_bytes(bytes(stored[:SEED_BYTES].tolist()), "little")
    if seed >= SEEDS:
        raise FormatError(f"holds {entry['names'][0]} as a seed that is none ({seed})")
    codes = balanced_codes(shape, entries, seed, stored.device)
    if _sum(codes, said["stages"], entries) != said["sum"]:
        raise FormatError(
            f"holds {entry['names'][0]} as a seed, from which other codes are drawn than were saved: the seed was "
            "altered, or this platform draws wrongly"
        )
    for stage, held in stored_stages(entry, stored).items():
        codes[stage] = held
    return codes, seed


def stored_stages(entry: Mapping[str, Any], stored: Tensor) -> dict[int, Tensor]:
    """Returns the codes ``[M, N]`` of those stages that were not drawn; nothing is drawn.

    Args:
        entry: As ``unpacked`` takes it.
        stored: Likewise.

    Raises:
        FormatError: If codes point outside their codebook.
    """
    shape, entries = entry["shape"], entry["packed"]["entries"]
    others = [stage for stage in range(shape[0]) if stage not in entry["drawn"]["stages"]]
    if not others:
        return {}
    try:
        rest = unpack_codes(stored[SEED_BYTES:], entries, (len(others), *shape[1:]), code_dtype(entries))
    except RPQError as error:
        raise FormatError(f"holds {entry['names'][0]}, which cannot be unpacked: {error}") from error
    return dict(zip(others, rest, strict=True))


def wrong_entry(entry: Mapping[str, Any]) -> bool:
    """Returns whether the manifest's entry of a tensor says of drawn stages what cannot be.

    Args:
        entry: Its values have been looked at one by one.
    """
    stages, shape = entry["drawn"]["stages"], entry["shape"]
    rising = stages == sorted(set(stages))
    return "packed" not in entry or len(shape) != 3 or not rising or stages[-1] >= shape[0]


def packed_size(entry: Mapping[str, Any]) -> int:
    """Returns the bytes that a packed tensor takes in a file.

    Args:
        entry: Its entry in the manifest, checked as far as that goes without the file.
    """
    shape, entries = entry["shape"], entry["packed"]["entries"]
    if "drawn" in entry:
        return stored_bytes(shape, entries, len(entry["drawn"]["stages"]))
    return packed_bytes(math.prod(shape), entries)


def check_version(manifest: Mapping[str, Any]) -> None:
    """Raises where codes are to be drawn as a newer version of the library draws them.

    Args:
        manifest: Checked.

    Raises:
        FormatError: The message goes on from the file's name.
    """
    for entry in manifest["tensors"]:
        version = entry["drawn"]["version"] if "drawn" in entry else VERSION
        if version > VERSION:
            raise FormatError(
                f"holds {entry['names'][0]} as a seed of version {version} of the generator of codes, newer than this "
                f"library draws ({VERSION}); update rpqfx"
            )


def _sum(codes: Tensor, stages: Iterable[int], entries: int) -> int:
    """Returns a sum over the packed codes of some stages."""
    found = 0
    for stage in stages:
        held = pack_codes(codes[stage], entries).cpu()  # has to live as long as its bytes are read
        found = zlib.crc32(bytes_of(held), found)
    return found
