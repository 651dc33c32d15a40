"""The way back: a model of plain dense modules, with the weights that its codebooks stand for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rpqfx.errors import RewriteError, RPQError
from rpqfx.graph.copying import copy_model
from rpqfx.graph.sites import is_rewritten
from rpqfx.graph.snapshot import Snapshot
from rpqfx.graph.transformers_models import restore_pretrained
from rpqfx.kv.wrap import dense_kind
from rpqfx.nn.hosting.backed import backed_weights
from rpqfx.nn.hosting.release import release
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import refuse_distributed, rewrapped, unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.reporting.records import detach_records
from rpqfx.validation.values import flag


def dequantize(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Returns a copy of a model, or with ``inplace`` the model itself, whose weights are dense Parameters again.

    Modules have their original classes. Each weight becomes the tensor that its codebooks stand for, with their dtype,
    device and ``requires_grad``, under the name that it had before ``rpqify``; what was tied is tied again. State dicts
    then have the names and shapes of the dense model's, so that adapters can be merged, or the model be handed to code
    that knows dense layers only. Attention on codes (``quantize_kv``) and routed blocks (``route``) stay.

    Args:
        model: A model with quantized weights, on any device. Of a wrapped one (``torch.compile``, ``DataParallel``)
            the model within is changed, and wrapped again.
        inplace: Change ``model`` itself. Otherwise it is left untouched, and the result shares no tensor with it.

    Returns:
        The dense model, in the same mode. Its outputs are those of ``model`` to rounding.

    Raises:
        InputError: If ``model`` is no module.
        RPQError: If no weight of it is quantized.
        RewriteError: If the model cannot be copied, is in ``DistributedDataParallel`` or FSDP, is offloaded by
            accelerate, or holds a layer of a class that was derived from an RPQ layer and has no dense namesake.
            Whatever is raised, ``model`` is as it was.
    """
    check_model(model, "dequantize")
    flag("inplace", inplace)
    refuse_distributed(model, "dequantize")
    inner = unwrapped(model)
    if not is_rewritten(inner):
        raise RPQError("no weight of this model is quantized, so there is nothing to dequantize")
    check_not_offloaded(offloaded(inner), "dequantized")
    kinds = {module: _kind(inner, path) for path, module in inner.named_modules() if backed_weights(module)}
    if not inplace:
        kept = [tensor for weight in _weights(inner) for tensor in weight.parameters()]  # only the dense ones are new
        dense = copy_model(inner, kept)
        by_name = dict(dense.named_modules())
        names = {module: path for path, module in inner.named_modules()}
        kinds = {by_name[names[module]]: kind for module, kind in kinds.items()}
    else:
        dense = inner
    before = Snapshot(dense)
    try:
        _dequantized(dense, kinds)
        return rewrapped(model, dense)
    except BaseException:
        before.restore()
        raise


@torch.no_grad()
def _dequantized(model: nn.Module, kinds: dict[nn.Module, type[nn.Module]]) -> None:
    dense: dict[RPQWeight, nn.Parameter] = {}
    for module, kind in kinds.items():
        for weight in backed_weights(module).values():
            if weight not in dense:
                parameter = nn.Parameter(weight().detach().contiguous(), weight.codebooks.requires_grad)
                parameter.__dict__.update(weight.noted)
                dense[weight] = parameter
        release(module, kind, dense)
    restore_pretrained(model)
    detach_records(model)


def _weights(model: nn.Module) -> Iterable[RPQWeight]:
    return (module for module in model.modules() if isinstance(module, RPQWeight))


def _kind(model: nn.Module, path: str) -> type[nn.Module]:
    module, (above, _, name) = model.get_submodule(path), path.rpartition(".")
    kind = dense_kind(type(module))
    if kind is nn.Linear and name == "out_proj" and isinstance(model.get_submodule(above), nn.MultiheadAttention):
        return NonDynamicallyQuantizableLinear  # the one layer that stands for two classes
    if kind is None:
        raise RewriteError(
            f"{path or 'the model'} is a {type(module).__name__}, a class derived from an RPQ layer, whose dense "
            "namesake is not known; put an RPQ layer itself in its place, or read its weights one by one"
        )
    return kind
