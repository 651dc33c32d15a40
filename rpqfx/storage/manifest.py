"""The manifest of a saved file: every tensor under its names, every site and its spec.

Codes and floating Parameters of quantized weights are stored packed (``rpqfx.codebook.packing``), codes that were
drawn and never changed as their seed (``rpqfx.codebook.stored_codes``), all other tensors as they are. Names are those
that the model has without wrappers (``rpqfx.nn.wrappers``): torch.compile adds none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.codebook.packed_tiles import IN_TILES, pack_tiles
from rpqfx.codebook.packing import code_bits, pack_floats
from rpqfx.codebook.stored_codes import pack
from rpqfx.codebook.tiles import to_tiles
from rpqfx.errors import CodeError, RPQError
from rpqfx.kv.description import describe_kv
from rpqfx.nn.hosting.backed import backed_weights
from rpqfx.nn.hosting.reparametrised import hooked
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import modules_within, refuse_sharded
from rpqfx.reporting.records import SiteRecord, attached_records
from rpqfx.routing.rewrite.rewrite import routed
from rpqfx.storage.archive import is_dense
from rpqfx.storage.pickle_reader import DTYPES

FLAGS = {"plan", "read_as", "plain_when_compiled", "shares_codebooks"}  # of a weight


def describe(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns every tensor once, as it is stored, under its first name, and what is needed to put them back.

    Args:
        model: A model with RPQ layers or attention on codes, without wrappers around it.

    Returns:
        The tensors and a manifest of plain values.

    Raises:
        RPQError: If a tensor is on the meta device, offloaded by accelerate, or none that a file holds.
        RewriteError: If the model is sharded.
        CodeError: If codes point outside their codebook.
    """
    refuse_sharded(model, "a saved file")
    check_not_offloaded(offloaded(model), "saved")
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    first: dict[int, dict[str, Any]] = {}
    weights = [module for module in model.modules() if isinstance(module, RPQWeight)]
    holders = {id(weight.stored_codes): weight for weight in weights}
    floats = {id(parameter) for weight in weights for parameter in weight.parameters(recurse=False)}
    for kind, name, tensor in all_tensors(model):
        if id(tensor) in first:
            first[id(tensor)]["names"].append(name)
            continue
        holder = holders.get(id(tensor))
        plain = _plain(name, tensor if holder is None or holder.tiled_vectors(tensor) else holder.codes)
        entry = {
            "names": [name], "kind": kind, "dtype": _name(plain.dtype),
            "shape": list(plain.shape if holder is None else holder.spec.codes_shape),
            "requires_grad": tensor.requires_grad and kind == "parameter",
        }  # fmt: skip
        first[id(tensor)] = entry
        entries.append(entry)
        tensors[name] = plain
        if holder is not None:
            tensors[name], how = _packed(name, plain, holder)
            entry |= how
        elif id(tensor) in floats:
            tensors[name] = pack_floats(plain)
            if tensors[name].dtype is not tensor.dtype:
                entry["stored"] = _name(tensors[name].dtype)
    records, notes = attached_records(model) or ((), ())
    manifest = {
        "tensors": entries, "sites": _sites(model), "records": [_record_values(record) for record in records],
        "notes": list(notes),
    }  # fmt: skip
    more = {"kv": describe_kv(model), "routed": routed_names(model)}
    return _compact(tensors, {e["names"][0] for e in entries if "packed" in e or "stored" in e}), manifest | {
        key: value for key, value in more.items() if value
    }


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Returns a tensor without history, elements that others have too, or bits that say how it is to be read."""
    if tensor.is_meta:
        raise RPQError(
            f"{name} is on the meta device and has no values; call rpqfx.materialize first, or where accelerate keeps "
            "them elsewhere, load the model without offloading"
        )
    held = tensor.detach()
    if type(held) not in (Tensor, nn.Parameter) or held.layout is not torch.strided or held.is_quantized:
        kind = type(held).__name__ if type(held) is not Tensor else held.layout
        raise RPQError(f"{name} is a {kind}, and files hold plain dense tensors; make it one, as with .full_tensor()")
    if _name(held.dtype) not in DTYPES:
        raise RPQError(f"{name} is of {held.dtype}, and files hold {', '.join(DTYPES)}")
    held = held.resolve_conj().resolve_neg()
    return held if is_dense(held.shape, held.stride()) else held.contiguous()


def _compact(tensors: dict[str, Tensor], alone: set[str]) -> dict[str, Tensor]:
    """Returns tensors without the rest of the memory that they are parts of, which torch would store as well.

    Args:
        tensors: By name.
        alone: Those that are to share memory with no other.
    """
    storages = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
    used, users = Counter[int](), Counter[int]()
    for name, tensor in tensors.items():
        used[storages[name].data_ptr()] += tensor.nbytes
        users[storages[name].data_ptr()] += 1

    def whole(name: str) -> bool:
        place = storages[name].data_ptr()
        return storages[name].nbytes() <= used[place] and not (name in alone and users[place] > 1)

    return {name: tensor if whole(name) else tensor.clone() for name, tensor in tensors.items()}


def routed_names(model: nn.Module) -> list[str]:
    """Returns the names of routed blocks."""
    return sorted(routed(model))


def _packed(name: str, codes: Tensor, weight: RPQWeight) -> tuple[Tensor, dict[str, Any]]:
    """Returns codes or tiles as a file holds them: a tiled spec's in the order of tiles, drawn ones as a seed."""
    spec, drawn = weight.spec, weight.drawn_stages()
    how = {"bits": code_bits(spec.entries), "entries": spec.entries}
    try:
        if drawn:
            codes = codes if codes.shape == spec.codes_shape else weight.codes
            return pack(codes, spec.entries, weight.code_seed, drawn), {"packed": how, "drawn": list(drawn)}
        if not spec.tiled:
            return pack(codes, spec.entries, None, ()), {"packed": how}
        tiles = to_tiles(codes) if codes.shape == spec.codes_shape else codes
        return pack_tiles(tiles, spec.num_vectors, spec.entries), {"packed": how | {"order": IN_TILES}}
    except CodeError as error:
        raise CodeError(f"{name} holds {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sites(model: nn.Module) -> list[dict[str, Any]]:
    sites: dict[int, dict[str, Any]] = {}
    for path, _, module in modules_within(model):
        for name, weight in backed_weights(module).items():
            how = {"spec": weight.spec.to_dict(), "layout": weight.layout.to_dict(), "std": weight.std}
            how |= {flag: getattr(weight, flag) for flag in FLAGS}
            site = sites.setdefault(id(weight), {"names": [], **how})
            site["names"].append(f"{path}.{name}".lstrip("."))
    return list(sites.values())


def all_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yields kind, qualified name and value of every tensor that a file holds, each name once."""
    for path, _, module in modules_within(model):
        groups = (("parameter", module._parameters), ("buffer", module._buffers), ("attribute", module.__dict__))
        computed = hooked(module)  # from what is saved, so not saved themselves
        for kind, group in groups:
            for name, tensor in group.items():
                if isinstance(tensor, Tensor) and name not in computed:
                    yield kind, f"{path}.{name}".lstrip("."), tensor


def _record_values(record: SiteRecord) -> dict[str, Any]:
    values = {**record.__dict__, "spec": None if record.spec is None else record.spec.to_dict()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
