"""What a saved file says of a model: every tensor under its names, every site and its spec, and the way back.

Codes and floating Parameters of weights in codebooks are stored packed (``rpqfx.codebook.packing``), all other tensors
as they are. Names are those that the model has without wrappers (``rpqfx.nn.wrappers``): torch.compile adds none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.codebook.packing import check_codes, code_bits, pack_codes, pack_floats, unpack_codes
from rpqfx.codebook.tiles import MOST_ENTRIES, tiles_of_packed
from rpqfx.errors import CodeError, FormatError, RPQError
from rpqfx.graph.replace import install_all, parameter_at
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.kv.description import coder_tensors, describe_kv, put_back_kv
from rpqfx.kv.generation import adapt_generation
from rpqfx.nn.code_bytes import to_bytes
from rpqfx.nn.hosting.host import SUFFIX, backed_weights
from rpqfx.nn.hosting.reparametrised import hooked, refresh
from rpqfx.nn.layout import Layout
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import modules_within, names_within, refuse_sharded, unwrapped, wrappers
from rpqfx.reporting.report import SiteRecord, attach_records, attached_records
from rpqfx.routing.rewrite.rewrite import routed
from rpqfx.storage.archive import is_dense
from rpqfx.storage.pickle_reader import DTYPES

_FLAGS = {"plan", "read_as", "plain_when_compiled", "shares_codebooks"}  # of a weight; older files lack some
_RESERVED = frozenset(dir(nn.Module()))  # names that mean something to every module, so no tensor has them


# ------------------------------------------------------------------------------------------------- describing


def describe(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor once, as it is stored, under its first name, and what is needed to put them back.

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
    for kind, name, tensor in _all_tensors(model):
        if id(tensor) in first:
            first[id(tensor)]["names"].append(name)
            continue
        holder = holders.get(id(tensor))
        plain = _plain(name, tensor if holder is None else holder.codes)
        entry = {
            "names": [name], "kind": kind, "shape": list(plain.shape), "dtype": _name(plain.dtype),
            "requires_grad": tensor.requires_grad and kind == "parameter",
        }  # fmt: skip
        first[id(tensor)] = entry
        entries.append(entry)
        tensors[name] = plain
        if holder is not None:
            tensors[name], entry["packed"] = _packed(name, plain, holder.spec.entries)
        elif id(tensor) in floats:
            tensors[name] = pack_floats(plain)
            if tensors[name].dtype is not tensor.dtype:
                entry["stored"] = _name(tensors[name].dtype)
    records, notes = attached_records(model) or ((), ())
    manifest = {
        "tensors": entries, "sites": _sites(model), "records": [_record_values(record) for record in records],
        "notes": list(notes),
    }  # fmt: skip
    more = {"kv": describe_kv(model), "routed": _routed(model)}
    return _compact(tensors, {e["names"][0] for e in entries if "packed" in e or "stored" in e}), manifest | {
        key: value for key, value in more.items() if value
    }


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor without history, elements that others have too, or bits that say how it is to be read."""
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
    """Tensors without the rest of the memory that they are parts of, which torch would store as well.

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


def _routed(model: nn.Module) -> list[str]:
    return sorted(routed(model))


def _packed(name: str, codes: Tensor, entries: int) -> tuple[Tensor, dict[str, int]]:
    try:
        return pack_codes(codes, entries), {"bits": code_bits(entries), "entries": entries}
    except CodeError as error:
        raise CodeError(f"{name} holds {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sites(model: nn.Module) -> list[dict[str, Any]]:
    sites: dict[int, dict[str, Any]] = {}
    for path, _, module in modules_within(model):
        for name, weight in backed_weights(module).items():
            how = {"spec": weight.spec.to_dict(), "layout": weight.layout.to_dict(), "std": weight.std}
            how |= {flag: getattr(weight, flag) for flag in _FLAGS}
            site = sites.setdefault(id(weight), {"names": [], **how})
            site["names"].append(f"{path}.{name}".lstrip("."))
    return list(sites.values())


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
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


# ---------------------------------------------------------------------------------------------- putting it back


def unpacked(entry: dict[str, Any], stored: Tensor, entries: int | None = None, tiled: bool = False) -> Tensor:
    """A tensor as it was in the model.

    Args:
        entry: What the manifest says of it.
        stored: As it is in the file.
        entries: Of the codebook that it holds codes of, if it does.
        tiled: Whether these codes lie in tiles in the model; as such they are returned, before others are unpacked.

    Raises:
        FormatError: If it cannot be what the manifest says.
    """
    dtype = DTYPES[entry["dtype"]]
    try:
        if "packed" in entry:
            if tiled and entry["packed"]["entries"] == MOST_ENTRIES and entry["shape"][2] % 2 == 0:
                return tiles_of_packed(stored, tuple(entry["shape"]))
            codes = unpack_codes(stored, entry["packed"]["entries"], entry["shape"], dtype)
            return to_bytes(codes, tiled=True) if tiled else codes
        if entries is not None:
            check_codes(stored, entries)
    except RPQError as error:
        raise FormatError(f"holds {entry['names'][0]}, which cannot be unpacked: {error}") from error
    return stored.to(dtype) if "stored" in entry else stored


def codes_of(manifest: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Entries of the codebooks that tensors hold codes of, and whether these lie in tiles, by the tensors' names.

    Args:
        manifest: What ``describe`` said.
    """
    return {
        f"{name}{SUFFIX}.codes": (s["spec"]["entries"], s["spec"].get("tiled", False))
        for s in manifest["sites"]
        for name in s["names"]
    }


def put_back(
    model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], path: str, *, maker: str = "build()",
    partial: bool = False,
) -> None:  # fmt: skip
    """Puts codebooks into a dense model as a manifest says, and every tensor in its place.

    Args:
        model: As it was before it was rewritten; on any device, also meta.
        manifest: What ``describe`` said, checked.
        tensors: Unpacked, under their first names.
        path: Of the file, for messages.
        maker: What made the model, for messages.
        partial: Whether the model may have tensors that the manifest does not name.

    Raises:
        FormatError: If the model is not the one that was described.
    """
    for wrapper in wrappers(model):
        for name, tensor in (*wrapper.named_parameters(recurse=False), *wrapper.named_buffers(recurse=False)):
            if tensor.is_meta:
                raise FormatError(
                    f"{path} holds no {name} of the {type(wrapper).__name__} that {maker} made, which has no value on "
                    f"the meta device: have {maker} return the model alone, and wrap what is loaded"
                )
    known = names_within(model)
    kv = manifest.get("kv", [])
    missing = set(manifest.get("routed", ())) - set(_routed(model))
    if missing:
        raise FormatError(
            f"{path} holds a routed model ({min(missing)!r}), {maker} made one that is not: route it there, as in "
            "build=lambda: rpqfx.route(dense(), policy)"
        )
    put_back_kv(model, [one for one in kv if not one["outermost"]], known, path, maker)
    _install_sites(model, manifest, known, path, maker)
    put_back_kv(model, [one for one in kv if one["outermost"]], known, path, maker)
    missing = assign(model, manifest, tensors, path, maker)
    if missing and not partial:
        raise FormatError(f"{maker} made {min(missing)}, which {path} does not hold: it is of another model")
    for module in model.modules():
        refresh(module)
    adapt_pretrained(model)
    adapt_generation(model)
    attach_records(unwrapped(model), [_record(values) for values in manifest["records"]], manifest["notes"])


def _record(values: dict[str, Any]) -> SiteRecord:
    spec = None if values["spec"] is None else CodebookSpec.from_dict(values["spec"])
    tuples = {key: tuple(values[key]) for key in ("names", "shape")}
    return SiteRecord(**{**values, **tuples, "spec": spec})


def _install_sites(
    model: nn.Module, manifest: dict[str, Any], known: Mapping[str, str], path: str, maker: str
) -> None:  # fmt: skip
    placed = []
    for site in manifest["sites"]:
        spec, layout = CodebookSpec.from_dict(site["spec"]), Layout.from_dict(site["layout"])
        names = []
        for name in site["names"]:
            owner, _, attribute = name.rpartition(".")
            try:
                names.append(f"{known[owner]}.{attribute}".lstrip("."))
                shape = tuple(parameter_at(model, names[-1]).shape)
            except (KeyError, RPQError) as error:
                raise FormatError(f"{path} holds {name}, which the model that {maker} made has not") from error
            if shape != layout.shape:
                raise FormatError(f"{path} holds {name} of shape {layout.shape}, {maker} made it {shape}")
        weight = RPQWeight(spec, layout, std=site["std"], device="meta")
        for flag in _FLAGS & site.keys():
            setattr(weight, flag, site[flag])
        weight.take_notes(parameter_at(model, names[0]))
        placed.append((names, weight))
    try:
        install_all(model, placed)
    except RPQError as error:
        raise FormatError(f"{path} does not fit the model that {maker} made: {error}") from error


def assign(
    model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], path: str, maker: str
) -> set[str]:  # fmt: skip
    """Puts tensors in their places.

    Args:
        model: With a place for each.
        manifest: What ``describe`` said, checked.
        tensors: Unpacked, under their first names.
        path: Of the file, for messages.
        maker: What made the model, for messages.

    Returns:
        The names of those places for which there is no tensor.

    Raises:
        FormatError: If a tensor has no place, or one of another shape.
    """
    missing = {name for _, name, _ in _all_tensors(model)}
    modules = {name: module for name, _, module in modules_within(model)}
    coders = set(coder_tensors(model))
    for entry in manifest["tensors"]:
        tensor = tensors[entry["names"][0]]
        if entry["kind"] == "parameter":
            tensor = nn.Parameter(tensor, entry["requires_grad"])
        for name in entry["names"]:
            owner, _, attribute = name.rpartition(".")
            module = modules.get(owner)
            if module is None or not _has_place(module, entry["kind"], attribute):
                raise FormatError(f"{path} holds {name}, which the model that {maker} made has not")
            group = _group(module, entry["kind"])
            before = group.get(attribute)
            # buffers that are not saved with a state dict may have grown since the model was built, as caches do
            fixed = entry["kind"] == "parameter" or attribute not in module._non_persistent_buffers_set
            fixed = fixed and SUFFIX not in name and entry["kind"] != "attribute" and name not in coders
            if isinstance(before, Tensor) and fixed and before.shape != tensor.shape:
                raise FormatError(
                    f"{path} holds {name} of shape {tuple(tensor.shape)}, {maker} made it {tuple(before.shape)}"
                )
            if isinstance(tensor, nn.Parameter) and before is not None:
                tensor.__dict__.update(before.__dict__)
            if isinstance(module, RPQWeight) and attribute == "codes":
                module.codes = tensor
            else:
                group[attribute] = tensor
            missing.discard(name)
    return missing


def _has_place(module: nn.Module, kind: str, attribute: str) -> bool:
    """Whether a module has a tensor of this kind and name, or could have: attributes may come after it is built."""
    if kind != "attribute":
        return _group(module, kind).get(attribute) is not None
    if attribute in module.__dict__:
        return attribute not in _RESERVED and isinstance(module.__dict__[attribute], Tensor | None)
    taken = any(attribute in group for group in (module._parameters, module._buffers, module._modules))
    return not taken and attribute not in _RESERVED and getattr(type(module), attribute, None) is None


def _group(module: nn.Module, kind: str) -> dict[str, Any]:
    if kind == "attribute":
        return module.__dict__
    return module._parameters if kind == "parameter" else module._buffers
