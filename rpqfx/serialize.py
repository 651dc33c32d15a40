"""Saving and loading: plain tensors under qualified names, and a manifest.

A file holds every Parameter and buffer (also the non-persistent ones, and tensors kept in plain attributes, which a
model built on the meta device would lack), a manifest in JSON, and a checksum over both. Codes take the bits that they
need, and floats of weights in codebooks two bytes where that loses nothing (``rpqfx.packing``). It is read by
``torch.load(weights_only=True)``, or by safetensors where the name ends so; no code is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.arguments import check_model, check_path
from rpqfx.checks import shown
from rpqfx.errors import FormatError, InputError, RPQError
from rpqfx.files import draft, take_in
from rpqfx.graph.match import is_rewritten
from rpqfx.manifest import describe, put_back, unpacked

FORMAT = "rpqfx"
FORMAT_VERSION = 3  # 1 knew no tensors of experts and no flags of weights, 2 no packed tensors
_SAFETENSORS = ".safetensors"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Saves a rewritten model.

    The file appears whole or not at all: where writing fails, what was there before is still there.

    Args:
        model: A model with RPQ layers, on any device but meta.
        path: Where to; a name that ends in ``.safetensors`` makes a safetensors file (extra ``safetensors``).

    Raises:
        InputError: If ``model`` is no module, or the path no path.
        RPQError: If the model holds nothing in codebooks, or has tensors on the meta device.
        CodeError: If codes point outside their codebook.
        OSError: If the file cannot be written, as on a full disk.
        ImportError: If safetensors is asked for and not installed.
    """
    check_model(model, "save")
    check_path(path, "path")
    if not is_rewritten(model):
        raise RPQError("nothing in this model is held in codebooks; save a dense model with torch.save(state_dict())")
    tensors, manifest = describe(model)
    text = json.dumps({"version": FORMAT_VERSION, **manifest, "checksum": _checksum(tensors)})
    path = Path(path)
    write = _write_safetensors if path.suffix == _SAFETENSORS else _write_torch
    with draft(path) as part:
        write(part, text, tensors)


def load(
    path: str | os.PathLike[str],
    build: Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str = "cpu",
    build_device: torch.device | str = "meta",
) -> nn.Module:
    """Loads a model that [`save`][rpqfx.serialize.save] wrote.

    ``build`` makes the dense model; it runs on the meta device, so no dense weight is made. The codebooks are put in
    place as the manifest says and every tensor is taken from the file.

    Args:
        path: The file.
        build: Makes the model as it was before ``rpqify``; called once, without arguments. It has to be given.
        device: Where the tensors go.
        build_device: Where ``build`` runs; ``"cpu"`` for models that compute with values while they are built.

    Returns:
        The model, with outputs identical to the saved one's to the last bit. It is in the mode ``build`` gives it.

    Raises:
        InputError: If ``build`` is no function, or the path no path.
        FormatError: If the file is truncated, altered, of a newer format or no rpqfx file, or ``build`` makes a
            model that does not fit it. Nothing half-loaded is left behind.
        ImportError: If it is a safetensors file and safetensors is not installed.
    """
    check_path(path, "path")
    _check_build(build)
    assert build is not None
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
    put_back(model, manifest, tensors, path)
    return model


def _check_build(build: Any) -> None:
    """Sees that there is a function that builds the dense model."""
    example = "rpqfx.load(path, lambda: Model(config))"
    if build is None:
        raise InputError(
            f"load needs a function that builds the dense model, without arguments: {example}; the file holds its "
            "tensors, not its code"
        )
    if isinstance(build, nn.Module):
        raise InputError(
            f"build is a function that builds the dense model, got a model ({type(build).__name__}); give one that "
            f"makes it anew: {example}"
        )
    if not callable(build):
        raise InputError(f"build is a function that builds the dense model, got {shown(build)}; give {example}")


# ---------------------------------------------------------------------------------------------------- the file


def _write_torch(draft: Path, text: str, tensors: dict[str, Tensor]) -> None:
    try:
        with open(draft, "wb") as file:  # torch does not tell why it cannot write to a file that it opens itself
            torch.save({FORMAT: text, "seal": _seal(text), "tensors": tensors}, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.filename:
            raise
        raise OSError(cause.errno, cause.strerror, str(draft)) from error


def _write_safetensors(draft: Path, text: str, tensors: dict[str, Tensor]) -> None:
    save_file = _safetensors().save_file
    from safetensors import SafetensorError

    metadata = {"format": "pt", FORMAT: text, f"{FORMAT}_seal": _seal(text)}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata)
    except SafetensorError as error:
        raise OSError(f"{draft} cannot be written: {error}") from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        take_in(digest, tensors[name], name)
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
    first = {entry["names"][0]: entry for entry in manifest["tensors"]}
    return manifest, {name: unpacked(entry, tensors.pop(name), path).to(device) for name, entry in first.items()}


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
