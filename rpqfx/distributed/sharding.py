"""FSDP2 that shares out codes as well as codebooks.

``torch.distributed.fsdp.fully_shard`` shares out Parameters and leaves buffers alone, and codes, which are most of a
model with few bits, are buffers. Here they become Parameters that need no gradient, so that they are gathered, used and
freed together with the codebooks that they point into, by FSDP's own machinery.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as shard_parameters
from torch.distributed.tensor import DTensor, Shard

from rpqfx.errors import DistributedError
from rpqfx.nn.placement import name_of
from rpqfx.nn.weight import RPQWeight
from rpqfx.policies.arguments import check_model

_SHARDS_INTEGERS = (2, 13)  # FSDP of torch before this one wants gradients of all that it shards, and casts integers


def fully_shard(
    module: nn.Module | list[nn.Module],
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
) -> Any:
    """Shards a module over processes in place, as ``torch.distributed.fsdp.fully_shard``, codes included.

    Call it as torch's: on layers or blocks first and on the model last. Codes and signs become Parameters without a
    gradient, under the same names; they are never cast. Each tensor is cut along an axis that the number of processes
    divides, so that the memory of codebooks ``[R, G, K, d]`` falls with it also where there is one stage; where it
    divides none, the first axis is cut, as torch does.

    Weights that share codebooks, or that are tied, have to be in one group: one call with all modules that hold them.

    Args:
        module: A module, or several that are gathered and freed together.
        mesh: Processes, as for torch; all if left out.
        shard_placement_fn: Says for a Parameter which axis is cut; None, or a function that returns None, leaves it to
            this library.
        mp_policy: Mixed precision of floating Parameters.
        reshard_after_forward: As for torch's: whether gathered tensors are freed between forward and backward.
        offload_policy: As for torch's: where tensors are while they are not used.
        ignored_params: As for torch's: Parameters that stay whole.
        dp_mesh_dims: As for torch's, where its version has it: which axes of the mesh share out, and which replicate.

    Returns:
        ``module``.

    Raises:
        InputError: If ``module`` is no module.
        DistributedError: If weights outside of the module share codebooks or codes with weights in it (all are named),
            or this version of torch (before 2.13) cannot shard integers. The module is then as it was.
    """
    modules = module if isinstance(module, list) else [module]
    for one in modules:
        check_model(one, "fully_shard")
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    weights = list(_managed(one for one in modules if not isinstance(one, FSDPModule)))  # which torch refuses
    if weights and not shards_integers():
        raise DistributedError(
            f"codes are integers, which fully_shard of torch {torch.__version__} cannot shard; use torch "
            f"{'.'.join(map(str, _SHARDS_INTEGERS))} or newer, or torch's own fully_shard, which leaves codes whole in "
            "every process"
        )
    _refuse_parts_of_groups(weights)
    ranks = _ranks(mesh, dp_mesh_dims)

    def place(parameter: nn.Parameter) -> Any:
        asked = None if shard_placement_fn is None else shard_placement_fn(parameter)
        return Shard(axis_to_cut(parameter, ranks)) if asked is None else asked

    changed = [weight for weight in weights if "codes" not in weight._parameters]
    try:
        for weight in changed:
            weight.hold_codes_as_parameters()
        further = {} if dp_mesh_dims is None else {"dp_mesh_dims": dp_mesh_dims}
        return shard_parameters(
            module, mesh=mesh, reshard_after_forward=reshard_after_forward, shard_placement_fn=place, mp_policy=policy,
            offload_policy=offload_policy or OffloadPolicy(), ignored_params=ignored_params, **further,
        )  # fmt: skip
    except BaseException:
        for weight in changed:
            weight.hold_codes_as_buffers()
        raise


def axis_to_cut(parameter: torch.Tensor, ranks: int) -> int:
    """Returns the axis along which a Parameter is shared out.

    Args:
        parameter: A tensor with at least one axis, or a ``DTensor``, of which this process's part counts.
        ranks: The number of processes.

    Returns:
        The first axis that ``ranks`` divides, with those that are cut already last; 0 where it divides none.
    """
    shape, cut = parameter.shape, set()
    if isinstance(parameter, DTensor):
        shape = parameter.to_local().shape
        cut = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
    fits = [axis for axis, size in enumerate(shape) if size and size % ranks == 0]
    return min(fits, key=lambda axis: (axis in cut, axis), default=0)


def _managed(modules: Iterable[nn.Module]) -> Iterator[RPQWeight]:
    """Yields the weights that a group of these modules would hold: all but those of groups within them."""
    seen: set[int] = set()
    pending = list(modules)
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, RPQWeight):
            yield module
        pending += [child for child in module.children() if not isinstance(child, FSDPModule)]


def _refuse_parts_of_groups(weights: list[RPQWeight]) -> None:
    """Raises where a group would hold a part only of the weights that have tensors in common."""
    for weight in weights:
        if "codes" in weight._parameters and not isinstance(weight, FSDPModule):
            raise DistributedError(
                f"{name_of(weight)} is tied to a module that was sharded by itself, and both read the same tensors: "
                "put the modules that hold them into one call, rpqfx.distributed.fully_shard([first, second]), or "
                "leave both to the call on the model"
            )
    shared = {id(weight.codebooks) for weight in weights if weight.shares_codebooks}
    if not shared:
        return
    inside = {id(weight) for weight in weights}
    others = [  # a weight does not know which others have its codebooks
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), RPQWeight)
        and id(thing) not in inside
        and id(thing._parameters.get("codebooks")) in shared
    ]
    if others:
        within = [weight for weight in weights if any(weight.codebooks is other.codebooks for other in others)]
        raise DistributedError(
            f"codebooks are shared by {', '.join(map(name_of, within))} inside of what is to be sharded and by "
            f"{', '.join(map(name_of, others))} outside of it, and would be trained apart: put the modules that hold "
            "them into one call, rpqfx.distributed.fully_shard([first, second, ...]), leave all to the call on the "
            "model, or rewrite with a policy that shares codebooks within a block only"
        )


def _ranks(mesh: Any, dims: Any) -> int:
    """Returns over how many processes a mesh shares out tensors."""
    if mesh is None:
        return dist.get_world_size() if dist.is_initialized() else 1
    if dims is not None:
        return math.prod(mesh[name].size() for name in dims.shard_names)
    return int(mesh.size(mesh.ndim - 1))  # an outer axis holds copies


def shards_integers() -> bool:
    """Returns whether FSDP of the torch that is installed shards Parameters that are integers, and leaves them so."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= _SHARDS_INTEGERS
