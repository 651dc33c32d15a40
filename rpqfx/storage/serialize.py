"""Saving and loading: plain tensors under qualified names, and a manifest.

A file holds every Parameter and buffer (also the non-persistent ones, and tensors kept in plain attributes, which a
model built on the meta device would lack), a manifest in JSON, and a checksum over both. Codes take the bits that they
need, and floats of quantized weights two bytes where that loses nothing (``rpqfx.codebook.packing``). It can be read
by ``torch.load(weights_only=True)``, or by safetensors where the name ends so; no code is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import FormatError, InputError, RPQError
from rpqfx.graph.sites import is_rewritten
from rpqfx.graph.snapshot import Ambient
from rpqfx.kv.module import attentions
from rpqfx.nn.wrappers import unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.storage.container import FORMAT, Container, open_container, writer_for
from rpqfx.storage.pickle_reader import DTYPES
from rpqfx.storage.places import Place, name_of, opened, target_of, written
from rpqfx.storage.recipe import CLASS, builder_of, recipe_of
from rpqfx.storage.restore import codes_of, put_back, unpacked
from rpqfx.storage.sealed_manifest import FORMAT_VERSION, checksum, prepared, read_manifest, seal_of
from rpqfx.validation.values import shown

__all__ = ["FORMAT", "FORMAT_VERSION", "load", "save"]


def save(
    model: nn.Module,
    path: Place,
    *,
    build: type[nn.Module] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Saves a rewritten model.

    The file appears whole or not at all: where writing fails, or what was written is not what was to be, what was there
    before is still there. What stands around the model (``torch.compile``, ``DataParallel``,
    ``DistributedDataParallel``, ``AveragedModel``) is looked through: the model within is saved.

    Args:
        model: A model with RPQ layers or attention on codes, on any device but meta.
        path: Where to; a name that ends in ``.safetensors`` makes a safetensors file (extra ``safetensors``). A
            symbolic link is followed. Or a file object open for writing in binary, which gets the whole content at
            once.
        build: The class of the dense model. The file then says its name, and ``load`` needs no function.
        arguments: Its keyword arguments, in values that JSON has.

    Raises:
        InputError: If ``model`` is no module, the path no path, or a file object not open for writing in binary; if
            ``build`` is no class that can be imported, or makes another model, or the arguments are no plain values.
        RPQError: If the model has no quantized weight, has tensors on the meta device, or could not be loaded again.
        RewriteError: If the model is sharded.
        CodeError: If codes point outside their codebook.
        OSError: If the file cannot be written, as on a full disk, or the path leads to a folder.
        ImportError: If safetensors is to be written and is not installed.
    """
    check_model(model, "save")
    target = target_of(path)
    write = writer_for(name_of(path))
    if build is None and arguments is not None:
        raise InputError("arguments are those of build, and there is none; pass the class of the dense model as build")
    recipe = None if build is None else recipe_of(build, arguments)
    model = unwrapped(model)
    if not is_rewritten(model) and not attentions(model):
        raise RPQError("no weight of this model is quantized; save a dense model with torch.save(state_dict())")
    tensors, text = prepared(model, recipe)
    if recipe is not None:
        _check_recipe(recipe, json.loads(text))
    with written(target) as part:
        write(part, text, seal_of(text), tensors)
        _read_back(part, text, tensors)


def load(
    path: Place,
    build: Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str = "cpu",
    build_device: torch.device | str = "meta",
) -> nn.Module:
    """Loads a model that [`save`][rpqfx.storage.serialize.save] wrote.

    ``build`` makes the dense model; it runs on the meta device, so no dense weight is made. The codebooks are put in
    place as the manifest says and every tensor is taken from the file. Attention on codes comes back as well. Where
    ``build`` returns its model wrapped (compiled, say), that is what is returned.

    Args:
        path: The file, or a file object open for reading in binary, which is read from where it stands.
        build: Makes the model as it was before ``rpqify`` and ``quantize_kv``; called once, without arguments. It calls
            ``route`` where that was called. It may be left out where the file names the class of the dense model
            (``save(..., build=...)``) and this process has imported that class: a file imports nothing by itself.
        device: Where the tensors go.
        build_device: Where ``build`` runs; ``"cpu"`` for models that compute with values while they are built.

    Returns:
        The model, with outputs identical to the saved one's to the last bit. It is in the mode ``build`` gives it.

    Raises:
        FormatError: If the file is truncated, altered, of a newer format or no rpqfx file, or ``build`` makes a
            model that does not fit it. Nothing half-loaded is left behind.
        InputError: If ``build`` is no function, the path no path, or a file object not open for reading in binary.
        RPQError: If there is no such device.
        OSError: If the file is not there or cannot be read.
        ImportError: If it is a safetensors file and safetensors is not installed.
    """
    _check_build(build)
    for asked in (device, build_device):
        _check_device(asked)
    ambient = Ambient(None)
    try:
        return _loaded(path, build, device, build_device)
    except BaseException:
        ambient.restore()
        raise


def _loaded(path: Any, build: Callable[[], nn.Module] | None, device: Any, build_device: Any) -> nn.Module:
    """Loads a model; where this raises, function modes of torch may be on that were not."""
    manifest, tensors, name = read(path, device, _builder if build is None else None)
    make = _builder(manifest) if build is None else build
    with torch.device(build_device):
        try:
            model = make()
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
    put_back(model, manifest, tensors, name)
    return model


_EXAMPLE = "rpqfx.load(path, lambda: Model(config))"


def _builder(manifest: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Returns the function that builds the dense model of a file, where the caller gave none."""
    if "build" not in manifest:
        raise InputError(
            f"load needs a function that builds the dense model, without arguments: {_EXAMPLE}; the file holds its "
            "tensors, not its code, and names no class (rpqfx.save(model, path, build=Model) makes it do so)"
        )
    return builder_of(manifest["build"])


def _check_recipe(recipe: Mapping[str, Any], manifest: dict[str, Any]) -> None:
    """Raises an error unless a class makes the model that is to be saved."""
    try:
        with torch.device("meta"):
            model = builder_of(recipe)()
        tensors = {
            entry["names"][0]: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            for entry in manifest["tensors"]
        }
        put_back(model, manifest, tensors, "the model")
    except Exception as error:  # whatever the class raises
        raise InputError(
            f"build={recipe[CLASS]} with these arguments does not make this model ({error}); leave build out, and "
            "pass a function to load"
        ) from error


def _check_build(build: Any) -> None:
    """Raises an error unless what is given as build is a function that builds the dense model."""
    example = _EXAMPLE
    if build is None:
        return  # the file may name a class
    if isinstance(build, nn.Module):
        raise InputError(
            f"build is a function that builds the dense model, got a model ({type(build).__name__}); give one that "
            f"makes it anew: {example}"
        )
    if not callable(build):
        raise InputError(f"build is a function that builds the dense model, got {shown(build)}; give {example}")


# ---------------------------------------------------------------------------------------------------- the file


def read(
    path: Place, device: torch.device | str, check: Callable[[dict[str, Any]], Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Returns the manifest of a file, its tensors under their first names, and the file's name.

    Args:
        path: As ``load`` takes it.
        device: Where the tensors go.
        check: Called with the manifest before any tensor is read.

    Raises:
        FormatError: As ``load``.
        OSError: As ``load``.
    """
    with opened(path) as (file, name):
        try:
            held = open_container(file, name)
            manifest = read_manifest(held.text, held.seal, lambda _: held.stored)
            if check is not None:
                check(manifest)
            return manifest, _read(held, manifest, device), name
        except FormatError as error:
            raise FormatError(f"{name} {error}") from error


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device has its own way to say that it is not there
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RPQError(f"the device {str(device)!r} is not to be had here ({why}); name another") from error


def _read_back(part: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Raises unless a file says what was written to it; holds one tensor of it at a time."""
    try:
        with open(part, "rb") as file:
            held = open_container(file, part.name)
            digest = hashlib.sha256()
            for name in sorted(held.stored):
                held.take_in(digest, name)
            wanted = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            same = held.text == text and held.seal == seal_of(text) and dict(held.stored) == wanted
            if same and digest.hexdigest() == json.loads(text)["checksum"]:
                return
            why = "it is not what was to be written"
    except FormatError as error:
        why = str(error)
    raise OSError(
        f"what was written to {part} does not come back ({why}), so the file is as it was before; the disk may be "
        "failing, or the model has changed meanwhile"
    )


def _read(held: Container, manifest: dict[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    tensors = held.read(list(held.stored))
    if checksum(tensors) != manifest["checksum"]:
        raise FormatError("was altered: its tensors do not match its checksum; save the model again")
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    for entry in manifest["tensors"]:
        tensor = tensors[entry["names"][0]]
        if ("packed" in entry or "stored" in entry) and users[tensor.untyped_storage().data_ptr()] > 1:
            raise FormatError(f"was altered: {entry['names'][0]}, which takes more room unpacked, shares its bytes")
    codes = codes_of(manifest)
    first = {entry["names"][0]: entry for entry in manifest["tensors"]}
    return {name: unpacked(entry, tensors.pop(name), *codes.get(name, ())).to(device) for name, entry in first.items()}
