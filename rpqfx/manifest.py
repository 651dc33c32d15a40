"""What a saved file says of a model: every tensor under its names, every site and its spec, and the way back.

Codes and floating Parameters of weights in codebooks are stored packed (``rpqfx.packing``), all other tensors as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import CodeError, FormatError, RPQError
from rpqfx.graph.pretrained import adapt_pretrained
from rpqfx.graph.rewrite import install_all, parameter_at
from rpqfx.nn.backed import SUFFIX, backed_weights
from rpqfx.nn.computed import hooked, refresh
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight
from rpqfx.packing import code_bits, pack_codes, pack_floats, unpack_codes
from rpqfx.report import SiteRecord, attach_records, attached_records

_FLAGS = {"plan", "read_as", "plain_when_compiled", "shares_codebooks"}  # of a weight; older files lack some


# ------------------------------------------------------------------------------------------------- describing


def describe(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor once, as it is stored, under its first name, and what is needed to put them back.

    Args:
        model: A model with RPQ layers.

    Returns:
        The tensors and a manifest of plain values.

    Raises:
        RPQError: If a tensor is on the meta device.
        CodeError: If codes point outside their codebook.
    """
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    first: dict[int, dict[str, Any]] = {}
    weights = [module for module in model.modules() if isinstance(module, RPQWeight)]
    codes = {id(weight.codes): weight.spec.entries for weight in weights}
    floats = {id(parameter) for weight in weights for parameter in weight.parameters(recurse=False)}
    for kind, name, tensor in _all_tensors(model):
        if id(tensor) in first:
            first[id(tensor)]["names"].append(name)
            continue
        if tensor.is_meta:
            raise RPQError(f"{name} is on the meta device and has no values; call rpqfx.materialize first")
        entry = {
            "names": [name], "kind": kind, "shape": list(tensor.shape), "dtype": _name(tensor.dtype),
            "requires_grad": tensor.requires_grad and kind == "parameter",
        }  # fmt: skip
        first[id(tensor)] = entry
        entries.append(entry)
        tensors[name] = tensor.detach()
        if id(tensor) in codes:
            tensors[name], entry["packed"] = _packed(name, tensor, codes[id(tensor)])
        elif id(tensor) in floats:
            tensors[name] = pack_floats(tensor.detach())
            if tensors[name].dtype is not tensor.dtype:
                entry["stored"] = _name(tensors[name].dtype)
    records, notes = attached_records(model) or ((), ())
    manifest = {
        "tensors": entries, "sites": _sites(model), "records": [_record_values(record) for record in records],
        "notes": list(notes),
    }  # fmt: skip
    return tensors, manifest


def _packed(name: str, codes: Tensor, entries: int) -> tuple[Tensor, dict[str, int]]:
    try:
        return pack_codes(codes, entries), {"bits": code_bits(entries), "entries": entries}
    except CodeError as error:
        raise CodeError(f"{name} holds {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sites(model: nn.Module) -> list[dict[str, Any]]:
    sites: dict[int, dict[str, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, weight in backed_weights(module).items():
            how = {"spec": weight.spec.to_dict(), "layout": weight.layout.to_dict(), "std": weight.std}
            how |= {flag: getattr(weight, flag) for flag in _FLAGS}
            site = sites.setdefault(id(weight), {"names": [], **how})
            site["names"].append(f"{path}.{name}".lstrip("."))
    return list(sites.values())


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
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


def unpacked(entry: dict[str, Any], stored: Tensor, path: Any) -> Tensor:
    """A tensor as it was in the model.

    Args:
        entry: What the manifest says of it.
        stored: As it is in the file.
        path: Of the file, for messages.

    Raises:
        FormatError: If it cannot be what the manifest says.
    """
    dtype = getattr(torch, entry["dtype"])
    if "packed" not in entry:
        return stored.to(dtype) if "stored" in entry else stored
    try:
        return unpack_codes(stored, entry["packed"]["entries"], entry["shape"], dtype)
    except RPQError as error:
        raise FormatError(f"{path} holds {entry['names'][0]}, which cannot be unpacked: {error}") from error


def put_back(model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], path: Any) -> None:
    """Puts codebooks into a dense model as a manifest says, and every tensor in its place.

    Args:
        model: As it was before it was rewritten; on any device, also meta.
        manifest: What ``describe`` said.
        tensors: Unpacked, under their first names.
        path: Of the file, for messages.

    Raises:
        FormatError: If the model is not the one that was described.
    """
    _install_sites(model, manifest, path)
    _assign(model, manifest, tensors, path)
    for module in model.modules():
        refresh(module)
    adapt_pretrained(model)
    attach_records(model, [_record(values) for values in manifest["records"]], manifest["notes"])


def _record(values: dict[str, Any]) -> SiteRecord:
    spec = None if values["spec"] is None else CodebookSpec.from_dict(values["spec"])
    tuples = {key: tuple(values[key]) for key in ("names", "shape")}
    return SiteRecord(**{**values, **tuples, "spec": spec})


def _install_sites(model: nn.Module, manifest: dict[str, Any], path: Any) -> None:
    placed = []
    for site in manifest["sites"]:
        spec, layout = CodebookSpec.from_dict(site["spec"]), Layout.from_dict(site["layout"])
        for name in site["names"]:
            try:
                shape = tuple(parameter_at(model, name).shape)
            except (AttributeError, RPQError) as error:
                raise FormatError(f"{path} holds {name}, which the model that build() made has not") from error
            if shape != layout.shape:
                raise FormatError(f"{path} holds {name} of shape {layout.shape}, build() made it {shape}")
        with torch.device("meta"):
            weight = RPQWeight(spec, layout, std=site["std"])
            for flag in _FLAGS & site.keys():
                setattr(weight, flag, site[flag])
            weight.take_notes(parameter_at(model, site["names"][0]))
        placed.append((site["names"], weight))
    install_all(model, placed)


def _assign(model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], path: Any) -> None:
    missing = {name for _, name, _ in _all_tensors(model)}
    for entry in manifest["tensors"]:
        tensor = tensors[entry["names"][0]]
        if entry["kind"] == "parameter":
            tensor = nn.Parameter(tensor, entry["requires_grad"])
        for name in entry["names"]:
            owner, _, attribute = name.rpartition(".")
            try:
                module = model.get_submodule(owner)
            except AttributeError as error:
                raise FormatError(f"{path} holds {name}, which the model that build() made has not") from error
            group = _group(module, entry["kind"])
            before = group.get(attribute)
            if before is None and entry["kind"] != "attribute":
                raise FormatError(f"{path} holds {name}, which the model that build() made has not")
            # buffers that are not saved with a state dict may have grown since the model was built, as caches do
            fixed = entry["kind"] == "parameter" or attribute not in module._non_persistent_buffers_set
            fixed = fixed and SUFFIX not in name and entry["kind"] != "attribute"
            if isinstance(before, Tensor) and fixed and before.shape != tensor.shape:
                raise FormatError(
                    f"{path} holds {name} of shape {tuple(tensor.shape)}, build() made it {tuple(before.shape)}"
                )
            if isinstance(tensor, nn.Parameter) and before is not None:
                tensor.__dict__.update(before.__dict__)
            group[attribute] = tensor
            missing.discard(name)
    if missing:
        raise FormatError(f"build() made {sorted(missing)[0]}, which {path} does not hold: it is of another model")


def _group(module: nn.Module, kind: str) -> dict[str, Any]:
    if kind == "attribute":
        return module.__dict__
    return module._parameters if kind == "parameter" else module._buffers
