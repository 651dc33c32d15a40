"""Saving and loading: plain tensors under qualified names, and a manifest.

A file holds every Parameter and buffer (also the non-persistent ones, and tensors kept in plain attributes, which a
model built on the meta device would lack), a manifest in JSON, and a checksum over both. It is read by
``torch.load(weights_only=True)``, or by safetensors where the name ends so; no code is ever unpickled.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import FormatError, RPQError
from rpqfx.graph.match import is_rewritten
from rpqfx.graph.pretrained import adapt_pretrained
from rpqfx.graph.rewrite import install_all, parameter_at
from rpqfx.nn.backed import SUFFIX, backed_weights
from rpqfx.nn.computed import hooked, refresh
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight
from rpqfx.report import SiteRecord, attach_records, attached_records

FORMAT = "rpqfx"
FORMAT_VERSION = 2  # 1 knew no tensors of experts and no flags of weights
_SAFETENSORS = ".safetensors"
_FLAGS = {"plan", "read_as", "plain_when_compiled", "shares_codebooks"}  # of a weight; older files lack some


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Saves a rewritten model.

    The file appears whole or not at all.

    Args:
        model: A model with RPQ layers, on any device but meta.
        path: Where to; a name that ends in ``.safetensors`` makes a safetensors file (extra ``safetensors``).

    Raises:
        RPQError: If the model holds nothing in codebooks, or has tensors on the meta device.
        ImportError: If safetensors is asked for and not installed.
    """
    if not is_rewritten(model):
        raise RPQError("nothing in this model is held in codebooks; save a dense model with torch.save(state_dict())")
    tensors, manifest = _describe(model)
    stuck = [name for name, tensor in tensors.items() if tensor.is_meta]
    if stuck:
        raise RPQError(f"{stuck[0]} is on the meta device and has no values; call rpqfx.materialize first")
    manifest["checksum"] = _checksum(tensors)
    text = json.dumps(manifest)
    path = Path(path)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # made by the writer, with the usual permissions
    try:
        if path.suffix == _SAFETENSORS:
            metadata = {"format": "pt", FORMAT: text, f"{FORMAT}_seal": _seal(text)}
            _safetensors().save_file({n: t.contiguous() for n, t in tensors.items()}, draft, metadata)
        else:
            torch.save({FORMAT: text, "seal": _seal(text), "tensors": tensors}, draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def load(
    path: str | os.PathLike[str],
    build: Callable[[], nn.Module],
    *,
    device: torch.device | str = "cpu",
    build_device: torch.device | str = "meta",
) -> nn.Module:
    """Loads a model that [`save`][rpqfx.serialize.save] wrote.

    ``build`` makes the dense model; it runs on the meta device, so no dense weight is made. The codebooks are put in
    place as the manifest says and every tensor is taken from the file.

    Args:
        path: The file.
        build: Makes the model as it was before ``rpqify``; called once, without arguments.
        device: Where the tensors go.
        build_device: Where ``build`` runs; ``"cpu"`` for models that compute with values while they are built.

    Returns:
        The model, with outputs identical to the saved one's to the last bit. It is in the mode ``build`` gives it.

    Raises:
        FormatError: If the file is truncated, altered, of a newer format or no rpqfx file, or ``build`` makes a
            model that does not fit it. Nothing half-loaded is left behind.
        ImportError: If it is a safetensors file and safetensors is not installed.
    """
    manifest, tensors = _read(Path(path), device)
    with torch.device(build_device):
        try:
            model = build()
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):  # build's own trouble
                raise
            raise FormatError(
                f"build() computes with tensor values, which the meta device has not ({error}); pass build_device='cpu'"
            ) from error
    if not isinstance(model, nn.Module):
        raise FormatError(f"build() must return a torch.nn.Module, got {type(model).__name__}")
    if is_rewritten(model):
        raise FormatError("build() must return the dense model, as it was before rpqify; it is already rewritten")
    _install_sites(model, manifest, path)
    _assign(model, manifest, tensors, path)
    for module in model.modules():
        refresh(module)
    adapt_pretrained(model)
    records = [_record(values) for values in manifest["records"]]
    attach_records(model, records, manifest["notes"])
    return model


# ------------------------------------------------------------------------------------------------- describing


def _describe(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor once, under its first name, and what is needed to put them back."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    first: dict[int, dict[str, Any]] = {}
    for kind, name, tensor in _all_tensors(model):
        if id(tensor) in first:
            first[id(tensor)]["names"].append(name)
            continue
        entry = {
            "names": [name], "kind": kind, "shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[1],
            "requires_grad": tensor.requires_grad and kind == "parameter",
        }  # fmt: skip
        first[id(tensor)] = entry
        entries.append(entry)
        tensors[name] = tensor.detach()
    sites: dict[int, dict[str, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, weight in backed_weights(module).items():
            how = {"spec": weight.spec.to_dict(), "layout": weight.layout.to_dict(), "std": weight.std}
            how |= {flag: getattr(weight, flag) for flag in _FLAGS}
            site = sites.setdefault(id(weight), {"names": [], **how})
            site["names"].append(f"{path}.{name}".lstrip("."))
    records, notes = attached_records(model) or ((), ())
    manifest = {
        "version": FORMAT_VERSION, "tensors": entries, "sites": list(sites.values()),
        "records": [_record_values(record) for record in records], "notes": list(notes),
    }  # fmt: skip
    return tensors, manifest


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


def _record(values: dict[str, Any]) -> SiteRecord:
    spec = None if values["spec"] is None else CodebookSpec.from_dict(values["spec"])
    tuples = {key: tuple(values[key]) for key in ("names", "shape")}
    return SiteRecord(**{**values, **tuples, "spec": spec})


# ---------------------------------------------------------------------------------------------------- the file


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():  # straight from memory: torch needs numpy for any other view of its bytes
            digest.update((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need the extra: pip install 'rpqfx[safetensors]'") from error
    return safetensors.torch


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    read = _read_safetensors if path.suffix == _SAFETENSORS else _read_torch
    text, seal, tensors = read(path)
    if _seal(text) != seal:
        raise FormatError(f"{path} was altered: its manifest does not match its seal; save the model again")
    manifest = json.loads(text)
    if manifest["version"] > FORMAT_VERSION:
        raise FormatError(
            f"{path} is of format {manifest['version']}, newer than this library reads ({FORMAT_VERSION}); update rpqfx"
        )
    if (
        set(tensors) != {entry["names"][0] for entry in manifest["tensors"]}
        or _checksum(tensors) != manifest["checksum"]
    ):
        raise FormatError(f"{path} was altered: its tensors do not match its checksum; save the model again")
    return manifest, {name: tensor.to(device) for name, tensor in tensors.items()}


def _read_torch(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its reader of the day does
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} is truncated, altered or no rpqfx file: {why}") from error
    if not isinstance(held, dict) or FORMAT not in held or "tensors" not in held:
        raise FormatError(f"{path} is a torch file, but not one that rpqfx.save wrote")
    return held[FORMAT], held.get("seal", ""), held["tensors"]


def _read_safetensors(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    load_file = _safetensors().load_file
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as held:
            metadata = held.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is truncated, altered or no safetensors file: {error}") from error
    if FORMAT not in metadata:
        raise FormatError(f"{path} is a safetensors file, but not one that rpqfx.save wrote")
    return metadata[FORMAT], metadata.get(f"{FORMAT}_seal", ""), tensors


# ---------------------------------------------------------------------------------------------- putting it back


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
            group[attribute] = tensor
            missing.discard(name)
    if missing:
        raise FormatError(f"build() made {sorted(missing)[0]}, which {path} does not hold: it is of another model")


def _group(module: nn.Module, kind: str) -> dict[str, Any]:
    if kind == "attribute":
        return module.__dict__
    return module._parameters if kind == "parameter" else module._buffers
