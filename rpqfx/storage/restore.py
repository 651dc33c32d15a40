"""The way back from what a saved file says: tensors unpacked, codebooks put into a dense model, every tensor placed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.codebook.packed_tiles import IN_TILES, unpack_tiles
from rpqfx.codebook.packing import check_codes, unpack_codes
from rpqfx.codebook.stored_codes import stored_stages, unpack
from rpqfx.codebook.tiles import from_tiles
from rpqfx.errors import FormatError, RPQError
from rpqfx.graph.replace import install_all, parameter_at
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.kv.description import coder_tensors, put_back_kv
from rpqfx.kv.generation import adapt_generation
from rpqfx.nn.code_bytes import to_bytes
from rpqfx.nn.hosting.backed import SUFFIX
from rpqfx.nn.hosting.reparametrised import refresh
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import modules_within, names_within, unwrapped, wrappers
from rpqfx.reporting.records import SiteRecord, attach_records
from rpqfx.storage.manifest import FLAGS, all_tensors, routed_names
from rpqfx.storage.pickle_reader import DTYPES

_RESERVED = frozenset(dir(nn.Module()))  # names that mean something to every module, so no tensor has them


def unpacked(entry: dict[str, Any], stored: Tensor, entries: int | None = None, tiled: bool = False) -> Tensor:
    """Returns a tensor as it was in the model.

    Args:
        entry: Its entry in the manifest.
        stored: As it is in the file.
        entries: Entries of the codebook that it holds codes of, if it does.
        tiled: Whether these codes lie in tiles in the model; as such they are returned.

    Returns:
        The tensor; codes that are drawn from a seed as they are in the file, until their place is known.

    Raises:
        FormatError: If it cannot be what the manifest says.
    """
    dtype = DTYPES[entry["dtype"]]
    try:
        if "drawn" in entry:
            drawn, _ = stored_stages(stored, entry["shape"], entry["packed"]["entries"])
            if list(drawn) == entry["drawn"]:
                return stored
            raise FormatError(f"its stages {list(drawn)} are a seed, the manifest says {entry['drawn']}")
        if "packed" in entry:
            if entry["packed"].get("order") == IN_TILES:
                tiles = unpack_tiles(stored, entry["packed"]["entries"], tuple(entry["shape"]))
                return tiles if tiled else from_tiles(tiles, entry["shape"][2]).to(dtype)
            codes = unpack_codes(stored, entry["packed"]["entries"], entry["shape"], dtype)
            return to_bytes(codes, tiled=True) if tiled else codes
        if entries is not None:
            check_codes(stored, entries)
    except RPQError as error:
        raise FormatError(f"holds {entry['names'][0]}, which cannot be unpacked: {error}") from error
    return stored.to(dtype) if "stored" in entry else stored


def redrawn(entry: Mapping[str, Any], stored: Tensor) -> tuple[Tensor, int]:
    """Returns codes of which stages are held as a seed, and the seed.

    Args:
        entry: Their entry in the manifest.
        stored: As ``unpacked`` returned them, on the device where the codes go.

    Raises:
        FormatError: If these are not the codes that were saved.
    """
    try:
        return unpack(stored, entry["shape"], entry["packed"]["entries"])
    except RPQError as error:
        raise FormatError(f"holds {entry['names'][0]}, which cannot be unpacked: {error}") from error


def codes_of(manifest: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Returns the entries of the codebooks that tensors of codes refer to, and whether these lie in tiles, by name.

    Args:
        manifest: The manifest that ``describe`` wrote.
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
        manifest: The manifest that ``describe`` wrote, checked.
        tensors: As ``unpacked`` returned them, or on the meta device in their shapes; under their first names.
        path: Path of the file, for messages.
        maker: The call that made the model, for messages.
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
    missing = set(manifest.get("routed", ())) - set(routed_names(model))
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
    attach_records(unwrapped(model), [record_of(values) for values in manifest["records"]], manifest["notes"])


def record_of(values: dict[str, Any]) -> SiteRecord:
    """Returns the line of a report that a manifest has.

    Args:
        values: Values of ``manifest["records"]``.
    """
    spec = None if values["spec"] is None else CodebookSpec.from_dict(values["spec"])
    tuples = {key: tuple(values[key]) for key in ("names", "shape")}
    return SiteRecord(**{**values, **tuples, "spec": spec})


def _install_sites(
    model: nn.Module, manifest: dict[str, Any], known: Mapping[str, str], path: str, maker: str
) -> None:  # fmt: skip
    placed = []
    for site in manifest["sites"]:
        spec, layout = CodebookSpec.from_dict(site["spec"]), Layout.from_dict(site["layout"])
        names, dense = [], []
        for name in site["names"]:
            owner, _, attribute = name.rpartition(".")
            try:
                names.append(f"{known[owner]}.{attribute}".lstrip("."))
                dense.append(parameter_at(model, names[-1]))
            except (KeyError, RPQError) as error:
                raise FormatError(f"{path} holds {name}, which the model that {maker} made has not") from error
            shape = tuple(dense[-1].shape)
            if shape != layout.shape:
                raise FormatError(f"{path} holds {name} of shape {layout.shape}, {maker} made it {shape}")
        weight = RPQWeight(spec, layout, std=site["std"], device="meta")
        for flag in FLAGS:
            setattr(weight, flag, site[flag])
        weight.take_notes(dense[0])
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
        manifest: The manifest that ``describe`` wrote, checked.
        tensors: As ``put_back`` takes them.
        path: Path of the file, for messages.
        maker: The call that made the model, for messages.

    Returns:
        The names of those places for which there is no tensor.

    Raises:
        FormatError: If a tensor has no place, or one of another shape.
    """
    missing = {name for _, name, _ in all_tensors(model)}
    modules = {name: module for name, _, module in modules_within(model)}
    coders = set(coder_tensors(model))
    for entry in manifest["tensors"]:
        tensor, seed = tensors[entry["names"][0]], None
        if "drawn" in entry and not tensor.is_meta:
            try:
                tensor, seed = redrawn(entry, tensor)
            except FormatError as error:
                raise FormatError(f"{path} {error}") from error
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
                module.codes, module.code_seed = tensor, seed
            else:
                group[attribute] = tensor
            missing.discard(name)
    return missing


def _has_place(module: nn.Module, kind: str, attribute: str) -> bool:
    """Returns whether a module has a tensor of this kind and name, or could get one after it is built."""
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
