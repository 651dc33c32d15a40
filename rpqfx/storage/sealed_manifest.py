"""Manifests as text: their version, the checksum of tensors in them, and the seal over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import FormatError
from rpqfx.storage.container import without_doubles
from rpqfx.storage.files import take_in
from rpqfx.storage.manifest import describe
from rpqfx.storage.manifest_check import as_unsavable, check_manifest

FORMAT_VERSION = 1


def prepared(model: nn.Module, recipe: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], str]:
    """Returns what a file of a model holds: tensors as they are stored, and the manifest as text.

    Args:
        model: As ``save`` takes it, without wrappers.
        recipe: The class of the dense model and its arguments, if the file is to name them.

    Raises:
        RPQError: As ``save``.
    """
    tensors, manifest = describe(model)
    manifest = {"version": FORMAT_VERSION, **manifest, "checksum": checksum(tensors)}
    if recipe is not None:
        manifest["build"] = dict(recipe)
    try:
        check_manifest(manifest, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    except FormatError as error:
        raise as_unsavable(error) from error
    return tensors, json.dumps(manifest)


def read_manifest(
    text: str, seal: str, stored: Callable[[Any], Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
) -> dict[str, Any]:  # fmt: skip
    """Returns a manifest, held against its seal and against what is stored.

    Args:
        text: Text of the manifest.
        seal: Its hash when it was written.
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


def checksum(tensors: dict[str, Tensor]) -> str:
    """Returns the hash of tensors and their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        take_in(digest, tensors[name], name)
    return digest.hexdigest()


def seal_of(text: str) -> str:
    """Returns the seal of a manifest.

    Args:
        text: Text of the manifest.
    """
    return hashlib.sha256(text.encode()).hexdigest()
