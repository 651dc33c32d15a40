"""Converts attention on codes to plain values, and restores it from them in a model that has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rpqfx.errors import FormatError, RPQError
from rpqfx.graph.attention import AttentionSite
from rpqfx.graph.nested_tensors import without_nested_tensors
from rpqfx.graph.operands import Operand
from rpqfx.graph.written_products import Products
from rpqfx.kv.attention.rotary import HALVES, RotaryConvention
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.module import KVAttention
from rpqfx.kv.policy import KVPolicy
from rpqfx.kv.wrap import CORE, OF_TRANSFORMERS, kind_of, wrap
from rpqfx.nn.wrappers import modules_within

_SIDES = ("keys", "values")
_COMMITMENT = 0.25  # the quantiser's own


def describe_kv(model: nn.Module) -> list[dict[str, Any]]:
    """Returns what ``quantize_kv`` made of each attention module, all but the tensors.

    Args:
        model: Any model.

    Returns:
        A dict for each attention module, of values that JSON holds.

    Raises:
        RPQError: If there is attention on codes that was not put there by ``quantize_kv``.
    """
    found: dict[int, dict[str, Any]] = {}
    wrapped: set[int] = set()
    for name, _, module in modules_within(model):
        core = module._modules.get(CORE)
        if not isinstance(core, KVAttention):
            continue
        wrapped.add(id(core))
        kind = kind_of(module)
        if kind is None or not all(_is_usual(getattr(core, side, None)) for side in _SIDES):
            raise RPQError(f"{name} has attention on codes that quantize_kv did not make, and cannot be saved")
        if id(module) in found:
            found[id(module)]["names"].append(name)
            continue
        found[id(module)] = {
            "names": [name], "kind": kind, "outermost": "_kv_base" in vars(type(module)),
            "policy": core.policy.to_json(),
            "rotary_convention": None if core.rotary_convention is None else list(core.rotary_convention),
            "products": None if core.products is None else dataclasses.asdict(core.products),
            **{side: _values(getattr(core, side)) for side in _SIDES},
        }  # fmt: skip
    loose = next((core for core in model.modules() if isinstance(core, KVAttention) and id(core) not in wrapped), None)
    if loose is not None:
        raise RPQError(f"{loose.name} has attention on codes that quantize_kv did not make, and cannot be saved")
    return list(found.values())


def put_back_kv(
    model: nn.Module, described: Sequence[Mapping[str, Any]], names: Mapping[str, str], path: str,
    maker: str = "build()",
) -> None:  # fmt: skip
    """Has attention modules attend to codes, in place. Their coders' tensors are on the meta device.

    A module that does so already gets the coders that were described.

    Args:
        model: The model.
        described: What ``describe_kv`` said, checked.
        names: Names as ``get_submodule`` takes them, by the names that were described.
        path: Of the file, for messages.
        maker: What made the model, for messages.

    Raises:
        FormatError: If the model is not the one that was described.
    """
    for one in described:
        name = one["names"][0]
        try:
            module = model.get_submodule(names[name])
            if one["kind"] in OF_TRANSFORMERS and not hasattr(module, "config"):
                raise RPQError("no attention module of transformers")
            if one["kind"] == "latent" and not callable(getattr(type(module), "expand_kv", None)):
                raise RPQError(f"a {type(module).__name__}, which makes no keys of latents")
            core = module._modules.get(CORE)
            if not isinstance(core, KVAttention):
                core = KVAttention(KVPolicy.from_json(one["policy"]), name)
                wrap(AttentionSite(name, module, one["kind"]), core)
            core.policy, core.products = KVPolicy.from_json(one["policy"]), _products(one)
            core.rotary_convention = _rotary_convention(one)
            core.keys, core.values = (_coder(one[side]) for side in _SIDES)
        except KeyError:
            raise FormatError(
                f"{path} holds attention on codes at {name!r}, which the model that {maker} made has not"
            ) from None
        except RPQError as error:
            raise FormatError(f"{path} holds attention on codes at {name!r}, where {maker} made {error}") from error
    without_nested_tensors(model, [model.get_submodule(names[one["names"][0]]) for one in described])


def _rotary_convention(one: Mapping[str, Any]) -> RotaryConvention | None:
    """Returns the convention of a module's rotary embedding; that of halves where a file names none."""
    said = one.get("rotary_convention", list(HALVES) if one["kind"] == "transformers" else None)
    return None if said is None else RotaryConvention(*said)


def _products(one: Mapping[str, Any]) -> Products | None:
    """Returns which products of a module's code are those of its attention; None where it has none of its own."""
    said = one.get("products")
    return None if said is None else Products(**{**said, **{side: Operand(**said[side]) for side in _SIDES}})


def _is_usual(coder: Any) -> bool:
    """Returns whether a coder is one that ``quantize_kv`` makes: its quantiser may be set in more ways by hand."""
    if not isinstance(coder, HeadCoder):
        return False
    own = coder.quantizer
    set_by_hand = (
        own.shared_stages != 1
        or own.threshold_ema_dead_code
        or own.seed
        or own.commitment != _COMMITMENT
        or own.normalize
    )
    return not set_by_hand and own.layout.shared and not own.layout.strided


def _values(coder: HeadCoder) -> dict[str, Any]:
    quantizer = coder.quantizer
    return {
        "heads": coder.heads, "dim": coder.dim, "codebook_dim": coder.codebook_dim,
        "codebook_size": coder.codebook_size, "stages": list(quantizer.layout.stages),
        "transform": coder.mean is not None,
        "joint": coder.parts == 1 and coder.mean is not None and not coder.normalize, "strided": coder.strided,
        "normalize": coder.normalize, "use_cosine_sim": quantizer.use_cosine_sim, "beam": quantizer.beam,
        "decay": quantizer.decay, "fine": 0 if coder.analysis is None else coder.analysis.fine,
    }  # fmt: skip


def _coder(values: Mapping[str, Any]) -> HeadCoder:
    options = {key: value for key, value in values.items() if key != "fine"}
    with torch.device("cpu"):  # whatever the caller builds on: maps start from values
        coder = HeadCoder(**{**options, "device": "meta"})
        coder.resize(values["stages"], values["fine"])
    return coder


def coder_tensors(model: nn.Module) -> Iterator[str]:
    """Yields the names of all tensors of a model's coders, which are of whatever size calibration found.

    Args:
        model: Any model.
    """
    for name, _, module in modules_within(model):
        if isinstance(module, KVAttention):
            for own, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers()):
                yield f"{name}.{own}"
