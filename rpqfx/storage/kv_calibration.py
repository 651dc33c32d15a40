"""A calibration of ``quantize_kv`` in a file of its own: coders and policies, without the model.

It is a file as ``save`` writes it, of a bare tree of modules that holds nothing but the coders, so it is sealed,
checked and read back like any other. One tensor more says what modules the coders were fitted to.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from rpqfx.errors import FormatError, RewriteError
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.kv.calibration_files import CalibrationPath, opens_calibrations
from rpqfx.kv.description import describe_kv, put_back_kv
from rpqfx.kv.generation import adapt_generation
from rpqfx.kv.module import KVAttention, attentions
from rpqfx.kv.wrap import CORE, bare, kind_of
from rpqfx.nn.hosting.backed import SUFFIX
from rpqfx.nn.hosting.host import READ_AS
from rpqfx.nn.wrappers import modules_within, names_within, unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.storage.places import Place
from rpqfx.storage.restore import assign
from rpqfx.storage.serialize import read, save

_FITTED_TO = "fitted_to"
_MAKER = "the caller"


def save_calibration(model: nn.Module, path: Place) -> None:
    """Saves what ``quantize_kv`` fitted, for ``quantize_kv(model, path)`` to use again.

    Args:
        model: A model that ``quantize_kv`` returned, on any device but meta; it stays as it is.
        path: As ``save`` takes it.

    Raises:
        RewriteError: If the model has no attention on codes.
        RPQError: As ``save``.
        OSError: If the file cannot be written.
    """
    check_model(model, "save_calibration")
    model = unwrapped(model)
    if not attentions(model):
        raise RewriteError("this model has no attention on codes, so there is no calibration; call quantize_kv first")
    save(_coders(model), path)


def _coders(model: nn.Module) -> nn.Module:
    """Returns the coders of a model at the places that they have there, and nothing else."""
    modules = {name: module for name, _, module in modules_within(model)}
    names = [one["names"][0] for one in describe_kv(model)]
    root = _bare(modules[""]) if "" in names else nn.Module()
    for name in filter(None, names):
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, _bare(modules[name]))
    text = json.dumps({name: _shapes(modules[name]) for name in names}, sort_keys=True).encode()
    root.register_buffer(_FITTED_TO, torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return root


def _bare(module: nn.Module) -> nn.Module:
    kind, core = kind_of(module), module.get_submodule(CORE)
    assert kind is not None and isinstance(core, KVAttention)
    return bare(kind, core)


class _Saved:
    """A file of a calibration that was read.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: CalibrationPath) -> None:
        manifest, self._tensors, self._name = read(path, "cpu")
        said = self._tensors.pop(_FITTED_TO, None)
        if said is None or "kv" not in manifest:
            raise FormatError(
                f"{self._name} holds no calibration alone: save one with rpqfx.save_calibration; a whole model is "
                "loaded with rpqfx.load"
            )
        self._manifest = {**manifest, "tensors": [e for e in manifest["tensors"] if e["names"] != [_FITTED_TO]]}
        self._fitted_to: dict[str, dict[str, Any]] = json.loads(bytes(said.tolist()))

    def check(self, model: nn.Module) -> None:
        """See ``SavedCalibration``."""
        modules = {name: module for name, _, module in modules_within(model)}
        for name, said in self._fitted_to.items():
            if name not in modules:
                raise RewriteError(f"{self._name} was fitted to a model with {name!r}, which this one has not")
            found = _shapes(modules[name])
            if found["class"] != said["class"]:
                raise RewriteError(
                    f"{self._name} was fitted to a {said['class']} at {name!r}, where this model has a "
                    f"{found['class']}; calibrate this model"
                )
            for tensor, shape in said["shapes"].items():
                if found["shapes"].get(tensor, shape) != shape:
                    raise RewriteError(
                        f"{self._name} was fitted to {name}.{tensor} of shape {shape}, this model has it of "
                        f"{found['shapes'][tensor]}; calibrate this model"
                    )

    def put(self, model: nn.Module) -> None:
        """See ``SavedCalibration``."""
        described = self._manifest["kv"]
        known = names_within(model)
        put_back_kv(model, described, known, self._name, _MAKER)
        assign(model, self._manifest, self._tensors, self._name, _MAKER)
        own = {id(x) for core in attentions(model).values() for x in core.parameters()}
        for one in described:
            module = model.get_submodule(known[one["names"][0]])
            core = module.get_submodule(CORE)
            beside = next((x for x in (*module.parameters(), *model.parameters()) if id(x) not in own), None)
            core.to(torch.device("cpu") if beside is None else beside.device).train(module.training)
        adapt_pretrained(model)
        adapt_generation(model)


def _shapes(module: nn.Module) -> dict[str, Any]:
    """Returns the class of a module, and the shapes of its dense Parameters."""
    kind = type(module)
    while READ_AS in vars(kind):
        kind = getattr(kind, READ_AS)
    own = {name: x for name, x in module.named_parameters() if not name.startswith(CORE) and SUFFIX not in name}
    return {"class": kind.__name__, "shapes": {name: list(x.shape) for name, x in own.items()}}


opens_calibrations(_Saved)
