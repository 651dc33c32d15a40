"""Saving and loading: plain tensors under qualified names, and a manifest.

A file holds every Parameter and buffer (also the non-persistent ones, and tensors kept in plain attributes, which a
model built on the meta device would lack), a manifest in JSON, and a checksum over both. Codes take the bits that they
need, and floats of weights in codebooks two bytes where that loses nothing (``rpqfx.codebook.packing``). It can be read
by ``torch.load(weights_only=True)``, or by safetensors where the name ends so; no code is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rpqfx.errors import FormatError, InputError, RPQError
from rpqfx.graph.sites import is_rewritten
from rpqfx.graph.snapshot import Ambient
from rpqfx.kv.module import attentions
from rpqfx.nn.wrappers import unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.storage.container import FORMAT, Container, open_container, without_doubles, writer_for
from rpqfx.storage.files import draft, place, take_in
from rpqfx.storage.manifest import codes_of, describe, put_back, unpacked
from rpqfx.storage.manifest_check import as_unsavable, check_manifest
from rpqfx.validation.values import shown

__all__ = ["FORMAT", "FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 4  # 1 knew no tensors of experts and no flags of weights, 2 no packed tensors, 3 no attention on codes
_PLAIN_VERSION = 3  # of files of models that have none: older libraries read them, too

Place = str | bytes | os.PathLike[str] | os.PathLike[bytes] | BinaryIO


def save(model: nn.Module, path: Place) -> None:
    """Saves a rewritten model.

    The file appears whole or not at all: where writing fails, or what was written is not what was to be, what was there
    before is still there. What stands around the model (``torch.compile``, ``DataParallel``,
    ``DistributedDataParallel``, ``AveragedModel``) is looked through: the model within is saved.

    Args:
        model: A model with RPQ layers or attention on codes, on any device but meta.
        path: Where to; a name that ends in ``.safetensors`` makes a safetensors file (extra ``safetensors``). A
            symbolic link is followed. Or a file object open for writing in binary, which gets the whole content at
            once.

    Raises:
        InputError: If ``model`` is no module, the path no path, or a file object not open for writing in binary.
        RPQError: If the model holds nothing in codebooks, has tensors on the meta device, or could not be loaded again.
        RewriteError: If the model is sharded.
        CodeError: If codes point outside their codebook.
        OSError: If the file cannot be written, as on a full disk, or the path leads to a folder.
        ImportError: If safetensors is asked for and not installed.
    """
    check_model(model, "save")
    target = _target(path)
    write = writer_for(_name_of(path))
    model = unwrapped(model)
    if not is_rewritten(model) and not attentions(model):
        raise RPQError("nothing in this model is held in codebooks; save a dense model with torch.save(state_dict())")
    tensors, text = prepared(model)
    with _written(target) as part:
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
            ``route`` where that was called. It has to be given.
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
    assert build is not None
    for asked in (device, build_device):
        _check_device(asked)
    ambient = Ambient(None)
    try:
        return _loaded(path, build, device, build_device)
    except BaseException:
        ambient.restore()
        raise


def _loaded(path: Any, build: Callable[[], nn.Module], device: Any, build_device: Any) -> nn.Module:
    """Loads a model; where this raises, function modes of torch may be on that were not."""
    manifest, tensors, name = read(path, device)
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
    put_back(model, manifest, tensors, name)
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


def prepared(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Returns what a file of a model holds: tensors as they are stored, and the manifest as text.

    Args:
        model: As ``save`` takes it, without wrappers.

    Raises:
        RPQError: As ``save``.
    """
    tensors, manifest = describe(model)
    version = FORMAT_VERSION if "kv" in manifest or "routed" in manifest else _PLAIN_VERSION
    manifest = {"version": version, **manifest, "checksum": _checksum(tensors)}
    try:
        check_manifest(manifest, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    except FormatError as error:
        raise as_unsavable(error) from error
    return tensors, json.dumps(manifest)


def read(path: Place, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Returns the manifest of a file, its tensors under their first names, and the file's name.

    Args:
        path: As ``load`` takes it.
        device: Where the tensors go.

    Raises:
        FormatError: As ``load``.
        OSError: As ``load``.
    """
    with _opened(path) as (file, name):
        try:
            return *_read(open_container(file, name), device), name
        except FormatError as error:
            raise FormatError(f"{name} {error}") from error


def read_manifest(
    text: str, seal: str, stored: Callable[[Any], Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
) -> dict[str, Any]:  # fmt: skip
    """Returns a manifest, held against its seal and against what is stored.

    Args:
        text: Of the manifest.
        seal: What its hash was.
        stored: Gives dtype and shape of each tensor, by name, for a manifest that nothing is known of yet.

    Raises:
        FormatError: If it is not what ``prepared`` returned. The message goes on from the file's name.
    """
    if seal_of(text) != seal:
        raise FormatError("was altered: its manifest does not match its seal; save the model again")
    try:
        manifest = json.loads(text, object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"was altered: its manifest is no JSON ({error})") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatError(f"is of format {version}, newer than this library reads ({FORMAT_VERSION}); update rpqfx")
    try:
        check_manifest(manifest, stored(manifest))
    except FormatError as error:
        raise FormatError(f"was altered: {error}") from error
    return manifest


def _target(path: Place) -> Path | BinaryIO:
    """Where a file is to be written, seen to before there is any work."""
    if isinstance(path, (str, bytes, os.PathLike)):
        return place(path)
    if not callable(getattr(path, "write", None)) or isinstance(path, io.TextIOBase):
        raise InputError(
            f"save takes a path or a file object open for writing in binary, got {_kind(path)}; open it with 'wb'"
        )
    return path


def _name_of(path: Place) -> str:
    if isinstance(path, (str, bytes, os.PathLike)):
        return os.fsdecode(path)
    name = getattr(path, "name", None)
    return name if isinstance(name, str) else f"the {type(path).__name__}"


def _kind(path: Any) -> str:
    return f"a {type(path).__name__} in text mode" if isinstance(path, io.TextIOBase) else type(path).__name__


@contextlib.contextmanager
def _written(target: Path | BinaryIO) -> Iterator[Path]:
    """A path to write to; what is there comes to the target if nothing raises."""
    if isinstance(target, Path):
        with draft(target) as part:
            yield part
        return
    with tempfile.TemporaryDirectory(prefix="rpqfx-") as folder:
        part = Path(folder) / "content"
        yield part
        with open(part, "rb") as whole:
            shutil.copyfileobj(whole, target)


@contextlib.contextmanager
def _opened(path: Place) -> Iterator[tuple[BinaryIO, str]]:
    """A file to read, which can be sought in, and its name."""
    name = _name_of(path)
    if isinstance(path, (str, bytes, os.PathLike)):
        if os.path.isdir(path):
            raise IsADirectoryError(f"{name} is a folder; give the name of the file in it")
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed below)
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, f"{name} does not exist", name) from error
        with file:
            yield file, name
        return
    if not callable(getattr(path, "read", None)) or isinstance(path, io.TextIOBase):
        raise InputError(
            f"load takes a path or a file object open for reading in binary, got {_kind(path)}; open it with 'rb'"
        )
    rest = path.read()
    if not isinstance(rest, bytes):
        raise InputError(f"load takes a file object open in binary, the {type(path).__name__} gives {_kind(rest)}")
    yield io.BytesIO(rest), name


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
                take_in(digest, held.read([name])[name], name)
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


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        take_in(digest, tensors[name], name)
    return digest.hexdigest()


def seal_of(text: str) -> str:
    """Returns the seal of a manifest.

    Args:
        text: Of the manifest.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def _read(held: Container, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    manifest = read_manifest(held.text, held.seal, lambda _: held.stored)
    tensors = held.read(list(held.stored))
    if _checksum(tensors) != manifest["checksum"]:
        raise FormatError("was altered: its tensors do not match its checksum; save the model again")
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    for entry in manifest["tensors"]:
        tensor = tensors[entry["names"][0]]
        if ("packed" in entry or "stored" in entry) and users[tensor.untyped_storage().data_ptr()] > 1:
            raise FormatError(f"was altered: {entry['names'][0]}, which takes more room unpacked, shares its bytes")
    codes = codes_of(manifest)
    first = {entry["names"][0]: entry for entry in manifest["tensors"]}
    return manifest, {
        name: unpacked(entry, tensors.pop(name), *codes.get(name, ())).to(device) for name, entry in first.items()
    }
