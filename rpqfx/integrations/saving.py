"""``save_pretrained`` and ``push_to_hub`` of a rewritten transformers model.

transformers' own method does the work: it writes configs and shards and uploads. It is called on a twin of the model,
an object of the same class with the same modules and tensors, so that what saving needs to be told lies there and the
model itself is not touched.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import FormatError, InputError, RPQError
from rpqfx.graph.sites import is_rewritten
from rpqfx.integrations.card import write_card
from rpqfx.integrations.config import RPQConfig
from rpqfx.integrations.content import content
from rpqfx.integrations.transformers import RPQQuantizer
from rpqfx.kv.module import attentions
from rpqfx.reporting.report import report
from rpqfx.routing.rewrite.rewrite import route, routed, routing_of
from rpqfx.storage.container import FORMAT as MARK
from rpqfx.storage.pickle_reader import DTYPES
from rpqfx.storage.restore import put_back
from rpqfx.validation.values import shown

_CALLS = ("save_pretrained", "push_to_hub")


def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Writes a folder that ``from_pretrained`` opens, with codes packed to the bits that they need.

    Args:
        model: A transformers model; one with nothing quantized, routed or attending to codes is saved as ever.
        save_directory: The folder.
        *args: As for the model's own method.
        **kwargs: Likewise.

    Returns:
        What the model's own method returns.

    Raises:
        RPQError: If the model could not be loaded again, or a state dict has other values than the model. Nothing is
            written then.
    """
    own = _plain_class(model).save_pretrained
    given = inspect.signature(own).bind(model, save_directory, *args, **kwargs)
    given.apply_defaults()
    rewritten = is_rewritten(model) or attentions(model) or routed(model)
    if not rewritten or getattr(model, "_hf_peft_config_loaded", False):
        return own(model, save_directory, *args, **kwargs)
    if given.arguments.get("distributed_checkpoint"):
        raise InputError("distributed_checkpoint writes tensors of which each process has a part; save without it")
    _check_state_dict(model, given.arguments.get("state_dict"))
    twin = _twin(model)
    tensors, metadata = content(model)
    _check_loadable(twin, metadata)
    twin.hf_quantizer = _Prepared(twin.config.quantization_config, tensors, metadata)
    if given.arguments.get("push_to_hub"):
        _write_card_before_upload(twin)
    del tensors
    # A text: with a path, transformers 5.0 can save and not push.
    result = own(
        twin, os.fspath(save_directory), *args, **{**kwargs, **({"state_dict": None} if "state_dict" in kwargs else {})}
    )
    if given.arguments.get("is_main_process", True) and Path(save_directory).is_dir():
        write_card(Path(save_directory), twin)
    return result


def push_to_hub(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves a model and uploads what was written, with the model card.

    Args:
        model: A transformers model.
        *args: As for the model's own method.
        **kwargs: Likewise.

    Returns:
        What the model's own method returns.

    Raises:
        TypeError: If that method takes no such arguments; nothing is written then.
    """
    own = _plain_class(model).push_to_hub
    inspect.signature(own).bind(model, *args, **kwargs)
    twin = _twin(model)
    twin.save_pretrained = functools.partial(save_pretrained, model)
    _write_card_before_upload(twin)
    return own(twin, *args, **kwargs)


class _Prepared(RPQQuantizer):
    """Hands the tensors of one call to transformers' method, once."""

    def __init__(self, config: RPQConfig, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        super().__init__(config, pre_quantized=True)
        self._tensors, self._metadata = tensors, metadata

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, str]]:
        tensors, self._tensors = self._tensors, {}
        return tensors, self._metadata


def _plain_class(model: nn.Module) -> Any:
    return getattr(type(model), "_rpq_base", type(model))


def _twin(model: Any) -> Any:
    """An object that has all that the model has, and a config of its own."""
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    for name in _CALLS:
        twin.__dict__.pop(name, None)
    config = copy.deepcopy(model.config)
    bits = round(report(model).bits_per_weight, 4) if is_rewritten(model) else None
    config.quantization_config = RPQConfig.of_saved(bits, _routing(model))
    added = {"config": config, "_weight_conversions": [], "_keys_to_ignore_on_save": None}
    twin.__dict__.update(added)
    return twin


def _routing(model: nn.Module) -> dict[str, str]:
    policies = routing_of(model)
    if routed(model) and not policies:
        raise RPQError(
            "this model is routed, and does not say how: it was routed by another version of this library, or as a "
            "part of a larger model; route it anew, or save the larger one"
        )
    return {name: policy.to_json() for name, policy in policies.items()}


def _check_state_dict(model: nn.Module, given: Any) -> None:
    """Raises where a state dict that is to be saved is not the model's, as that of a part of it, or an average."""
    if given is None:
        return
    own = model.state_dict()
    places = {(tensor.data_ptr(), tensor.shape) for name, tensor in own.items() if name in given}
    for name, tensor in own.items():
        other = given.get(name)
        if other is None and (tensor.data_ptr(), tensor.shape) not in places and tensor.numel():
            raise InputError(f"save_pretrained was given a state_dict without {name}; leave it out: the model has all")
        if isinstance(other, Tensor) and other.data_ptr() != tensor.data_ptr():
            same = other.shape == tensor.shape and torch.equal(other.to(tensor.device), tensor)
            if not same:
                raise InputError(
                    f"save_pretrained was given a state_dict whose {name} is not the model's; load it into the model "
                    "first (load_state_dict), and save without"
                )
    more = next((name for name in given if name not in own), None)
    if more is not None:
        raise InputError(f"save_pretrained was given a state_dict with {shown(more)}, which the model has not")


def _check_loadable(twin: Any, metadata: dict[str, str]) -> None:
    """Raises where ``from_pretrained`` would not make a model into which this one's tensors fit.

    A model that its class cannot make on the meta device by itself is not checked: transformers helps it along.
    """
    config = copy.deepcopy(twin.config)
    routing = config.quantization_config.routing
    del config.quantization_config
    manifest = json.loads(metadata[MARK])
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            made = _plain_class(twin)(config)
        except Exception:  # foreign code
            return
        try:
            for name, policy in routing.items():
                route(made.get_submodule(name), type(routing_of(twin)[name]).from_json(policy), inplace=True)
            tensors = {
                entry["names"][0]: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                for entry in manifest["tensors"]
            }
            put_back(made, manifest, tensors, "the folder", maker="from_pretrained")
        except (FormatError, RPQError) as error:
            raise RPQError(
                f"from_pretrained could not load this model again, so it is not saved: {error}. It makes the model "
                "from its config alone; rpqfx.save takes any model"
            ) from error


def _write_card_before_upload(twin: Any) -> None:
    """Has the card written last: transformers writes one of its own just before it uploads."""
    upload = _plain_class(twin)._upload_modified_files

    def with_card(working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        write_card(Path(working_dir), twin)
        return upload(twin, working_dir, *args, **kwargs)

    twin.__dict__["_upload_modified_files"] = with_card
