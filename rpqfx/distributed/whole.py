"""Values of a whole model for one whose tensors are shared out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.nn.shards import is_shard, part_of
from rpqfx.nn.weight import RPQWeight
from rpqfx.policies.arguments import check_model
from rpqfx.validation.values import shown


def load_full_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Loads the state dict of a whole model into one that is shared out; nothing is sent.

    Every process has the whole state dict and takes its part. Codes may be integers ``[R, M, N]``, as a model that is
    not sharded has them, or the bytes that a sharded one has.

    Args:
        model: A model that ``fully_shard`` or ``parallelize_module`` has shared out, with values or on any device but
            meta.
        state_dict: The same in every process.
        strict: Whether names have to be the same.

    Returns:
        Names that are missing and names that are not expected, as ``load_state_dict`` does.

    Raises:
        InputError: If ``model`` is no module or ``state_dict`` no mapping.
        CodeError: If codes point outside their codebook.
        RuntimeError: If names or shapes do not fit.
    """
    check_model(model, "load_full_state_dict")
    if not isinstance(state_dict, Mapping):
        raise InputError(f"load_full_state_dict takes a state dict, got {shown(state_dict)}")
    own = {  # a quantized weight takes its parts itself
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RPQWeight)
        for name in (*module._parameters, *module._buffers)
    }
    parts = model.state_dict()

    def part(name: str, given: Any) -> Any:
        here = parts.get(name)
        if name in own or not isinstance(given, Tensor) or here is None or not is_shard(here) or is_shard(given):
            return given
        return part_of(given, here) if given.shape == here.shape else given

    return model.load_state_dict({name: part(name, given) for name, given in state_dict.items()}, strict=strict)
