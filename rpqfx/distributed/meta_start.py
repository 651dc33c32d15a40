"""Values for a model that was sharded on the meta device: each process keeps its part of what one would draw."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rpqfx.distributed.agreement import gathered
from rpqfx.errors import DistributedError
from rpqfx.nn.offloaded import check_not_offloaded, offloaded
from rpqfx.nn.shards import part_of
from rpqfx.policies.arguments import check_model
from rpqfx.storage.materialize import check_init, device_with_values, fill


def materialize(
    model: nn.Module, device: torch.device | str = "cpu", init: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Allocates and initialises what is on the meta device, in place, in a model that ``fully_shard`` has shared out.

    Every process draws the same numbers, one module at a time, and keeps its part of them. So the values are, to the
    last bit, those that ``rpqfx.materialize`` gives in one process from the same seed, and no process ever holds more
    than the whole of one module besides its parts.

    Args:
        model: A rewritten model, sharded while it was on the meta device.
        device: Where the tensors go: the device type of the mesh.
        init: Called with each module that owns a tensor that was on the meta device, whose tensors are whole then.

    Returns:
        ``model``.

    Raises:
        InputError: If ``model`` is no module, the device none that holds values, or there is nothing for ``init``.
        DistributedError: If the processes' random generators are not in the same state, so that the parts would not be
            parts of one tensor, or nothing on the meta device is sharded.
        RewriteError: If a module can not be initialised, or accelerate has offloaded a tensor. Where this or anything
            else is raised, the model is as it was, on the meta device.
    """
    check_model(model, "materialize")
    where = device_with_values(device)
    check_init(init)
    check_not_offloaded(offloaded(model), "given new values")
    if not any(isinstance(p, DTensor) and p.is_meta for p in model.parameters()):
        raise DistributedError(
            "no Parameter of the model is both sharded and on the meta device; for a model that is not sharded there "
            "is rpqfx.materialize, and tensors that have values keep them"
        )
    state = hashlib.sha256(bytes(torch.get_rng_state().tolist()))
    if where.type != "cpu":
        state.update(bytes(torch.get_device_module(where).get_rng_state().tolist()))
    if len(set(gathered(state.digest(), where, None))) > 1:
        raise DistributedError(
            "the random generators of the processes are in different states, so that each would draw other values; "
            "call torch.manual_seed with the same seed in all of them right before materialize"
        )
    return fill(model, where, init, _whole)


@contextlib.contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Gives a module whole tensors in place of its parts, which get their share of them in the end."""
    parts: dict[str, Any] = {name: p for name, p in module._parameters.items() if isinstance(p, DTensor)}
    for name, part in parts.items():
        whole = torch.empty(part.shape, dtype=part.dtype, device=part.to_local().device)
        module._parameters[name] = nn.Parameter(whole, part.requires_grad)
    try:
        yield
        with torch.no_grad():
            for name, part in parts.items():
                part.to_local().copy_(part_of(module._parameters[name], part).to_local())  # type: ignore[arg-type]
    finally:
        module._parameters.update(parts)
