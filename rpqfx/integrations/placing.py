"""Names of a folder's manifest as the names of the model that is made of it.

That model may be another than the one that was saved: the body alone, or the body under another head. transformers
then takes a prefix off or puts one on, leaves out what the model has no place for, and draws what the folder lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rpqfx.errors import FormatError
from rpqfx.kv.wrap import CORE
from rpqfx.nn.hosting.backed import SUFFIX
from rpqfx.nn.wrappers import modules_within

Rename = Callable[[str], str | None]


def placed(
    manifest: dict[str, Any], model: nn.Module, whole: bool, path: str
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """Returns a manifest of what a model has a place for, under the names it has there, and the names in the files.

    Args:
        manifest: What the folder says.
        model: On the meta device, dense, of transformers.
        whole: Whether the model is of the class that was saved, and so has a place for everything.
        path: Of the folder, for messages.

    Returns:
        The manifest, and by the new first name of each tensor the old one.

    Raises:
        FormatError: If nothing of the folder has a place.
    """
    if whole:
        return manifest, {entry["names"][0]: entry["names"][0] for entry in manifest["tensors"]}
    if manifest.get("routed"):
        raise FormatError(f"{path} holds a routed model, which only the class that it was saved from can open")
    rename = _renaming(model)
    entries, stored_as = [], {}
    for entry in manifest["tensors"]:
        names = _some(entry["names"], rename)
        if names:
            entries.append({**entry, "names": names})
            stored_as[names[0]] = entry["names"][0]
    if not entries:
        raise FormatError(f"{path} holds nothing that a {type(model).__name__} has a place for: it is of another model")
    sites = [{**site, "names": names} for site in manifest["sites"] if (names := _some(site["names"], rename))]
    records = [
        {**record, "names": names, "name": names[0]}
        for record in manifest["records"]
        if (names := _some(record["names"], rename))
    ]
    found = {**manifest, "tensors": entries, "sites": sites, "records": records}
    if "kv" in manifest:
        modules = _renaming(model, of_modules=True)
        found["kv"] = [{**one, "names": names} for one in manifest["kv"] if (names := _some(one["names"], modules))]
    return found, stored_as


def _some(names: list[str], rename: Rename) -> list[str]:
    """Those of some names that the model has, as it has them, each once."""
    return list(dict.fromkeys(new for name in names if (new := rename(name)) is not None))


def _renaming(model: nn.Module, of_modules: bool = False) -> Rename:
    known = set[str]()
    for name, _, module in modules_within(model):
        if of_modules:
            known.add(name)
            continue
        groups: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        known |= {
            f"{name}.{own}".lstrip(".") for group in groups for own, value in group.items() if isinstance(value, Tensor)
        }
        known.add(f"{name}.{CORE}".lstrip("."))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def rename(name: str) -> str | None:
        base = name.partition(f"{SUFFIX}.")[0]
        before, core, _ = name.partition(f".{CORE}.")
        base = f"{before}.{CORE}" if core else base
        for change in (lambda text: text, lambda text: text.removeprefix(prefix), lambda text: prefix + text):
            if change(base) in known:
                return change(name)
        return None

    return rename
