"""Codes that are the same in all processes: sent once, and compared by digests.

DistributedDataParallel knows codes as buffers. It sends those before every forward, or with ``broadcast_buffers=False``
never, not even when it starts. Neither is right for tensors that stay as they are while a model trains.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rpqfx.errors import DistributedError, InputError
from rpqfx.nn.shards import is_shard
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.wrappers import unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.storage.files import take_in

_SIZE = hashlib.sha256().digest_size
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks


def broadcast_codes(model: nn.Module, group: dist.ProcessGroup | None = None, src: int = 0) -> nn.Module:
    """Sends the codes and signs of one process to all others, and has DistributedDataParallel leave them alone.

    Every process of the group calls it with the module that is to be wrapped, before it is wrapped. DDP then sends
    codebooks, scales and dense Parameters when it starts, and gradients afterwards; codes are sent here and nowhere
    else, whatever ``broadcast_buffers`` says. Which buffers DDP leaves alone is noted on the module, in copies and
    pickles of it, too. Where codes are changed later on, call it again.

    Args:
        model: A rewritten model, the same in all processes but for its values.
        group: The processes; all if left out.
        src: The process whose codes all others take, as a rank in the group.

    Returns:
        ``model``.

    Raises:
        InputError: If ``model`` is no module or has no quantized weight.
        DistributedError: If there is no process group, the processes hold different models, or codes are on the meta
            device or shared out already. Nothing is sent then.
    """
    held = _codes_of(model, "broadcast_codes", group)
    _check_same_models(held, group)
    for tensor in _tensors(held):
        sent = tensor.contiguous()
        dist.broadcast(_sendable(sent), group=group, group_src=src)
        if sent is not tensor:
            tensor.copy_(sent)
    _broadcast_seeds(list(held.values()), group, src)
    within = unwrapped(model)
    names = {
        f"{path}.{name}".lstrip(".")
        for path, module in within.named_modules(remove_duplicate=False)
        if isinstance(module, RPQWeight)
        for name in ("codes", "signs")
    }
    ignored = list(getattr(within, _IGNORED, ()))
    within.__dict__[_IGNORED] = ignored + sorted(names.difference(ignored))
    return model


def check_same_codes(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Raises unless all processes hold the same codes; sends one digest for each weight.

    Processes whose codes were drawn from different seeds train different models under the same codebooks, and no loss
    shows it. Every process of the group calls it; the error is raised in all of them.

    Args:
        model: A rewritten model, on any device but meta; also a wrapped one.
        group: The processes; all if left out.

    Raises:
        InputError: If ``model`` is no module or has no quantized weight.
        DistributedError: If processes hold different codes or different models, there is no process group, or codes
            are on the meta device or shared out.
    """
    held = _codes_of(model, "check_same_codes", group)
    _check_same_models(held, group)
    device = next(iter(held.values())).stored_codes.device
    everyone = gathered(b"".join(_digest(name, weight) for name, weight in held.items()), device, group)
    others = [rank for rank, digests in enumerate(everyone) if digests != everyone[0]]
    if others:
        parts = [[digests[start : start + _SIZE] for start in range(0, len(digests), _SIZE)] for digests in everyone]
        different = [name for name, found in zip(held, zip(*parts, strict=True), strict=True) if len(set(found)) > 1]
        raise DistributedError(
            f"the codes of {_some(different)} are not the same in all processes: those of rank "
            f"{', '.join(map(str, others))} differ from rank 0's, as when each draws its own from another seed. Call "
            "rpqfx.distributed.broadcast_codes(model) in every process before the model is wrapped, or load all from "
            "one file"
        )


def _codes_of(model: nn.Module, call: str, group: dist.ProcessGroup | None) -> dict[str, RPQWeight]:
    """Returns every weight by its first name; raises where there is nothing that could be sent or compared."""
    check_model(model, call)
    if not dist.is_initialized():
        raise DistributedError(f"{call} is for several processes; call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise DistributedError(f"{call}: this process is not in the group; only those that are call it")
    held = {name: m for name, m in unwrapped(model).named_modules() if isinstance(m, RPQWeight)}
    if not held:
        raise InputError(f"{call}: no weight of this model is quantized; rewrite it with rpqfx.rpqify first")
    for name, weight in held.items():
        if is_shard(weight.stored_codes):
            raise DistributedError(f"{call}: the codes of {name} are shared out over processes, none has all of them")
        if weight.stored_codes.is_meta:
            raise DistributedError(f"{call}: the codes of {name} have no values; call rpqfx.materialize(model) first")
    return held


def _check_same_models(held: dict[str, RPQWeight], group: dist.ProcessGroup | None) -> None:
    """Raises where processes hold weights of other names or shapes: what one sends would not fit the others."""
    mine = {name: f"{weight.spec} {weight.layout}" for name, weight in held.items()}
    device = next(iter(held.values())).stored_codes.device
    everyone = gathered(hashlib.sha256(repr(mine).encode()).digest(), device, group)
    others = [rank for rank, digest in enumerate(everyone) if digest != everyone[0]]
    if others:
        raise DistributedError(
            f"the models of rank {', '.join(map(str, others))} and of rank 0 hold other quantized weights, "
            f"or weights of other shapes (here {len(held)}: {_some(list(held))}); build and rewrite the same model, by "
            "the same policy, in every process"
        )


def _tensors(held: dict[str, RPQWeight]) -> list[Tensor]:
    """Returns the integers of weights, each once."""
    found = [tensor for weight in held.values() for tensor in (weight.stored_codes, weight.signs) if tensor is not None]
    return list({id(tensor): tensor for tensor in found}.values())


def _broadcast_seeds(weights: list[RPQWeight], group: dist.ProcessGroup | None, src: int) -> None:
    """Sends the seeds of codes along, so that each process can save a model as small as the one whose codes it has."""
    none = -1
    mine = [none if weight.code_seed is None else weight.code_seed for weight in weights]
    seeds = torch.tensor(mine, dtype=torch.int64, device=weights[0].stored_codes.device)
    dist.broadcast(seeds, group=group, group_src=src)
    for weight, seed in zip(weights, seeds.tolist(), strict=True):
        weight.code_seed = None if seed == none else seed


def _sendable(tensor: Tensor) -> Tensor:
    """Returns the same memory as bytes; codes that accelerate has put back have two each."""
    return tensor.detach() if tensor.element_size() == 1 else tensor.detach().view(torch.uint8)


def _digest(name: str, weight: RPQWeight) -> bytes:
    digest = hashlib.sha256()
    for tensor in _tensors({name: weight}):
        take_in(digest, _sendable(tensor), name)
    return digest.digest()


def gathered(mine: bytes, device: torch.device, group: dist.ProcessGroup | None) -> list[bytes]:
    """Returns what every process of a group has, by rank.

    Args:
        mine: What this process has; all have as many bytes.
        device: One that the group's back end sends from.
        group: The processes; all if None.
    """
    sent = torch.tensor(list(mine), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, sent, group=group)
    return [bytes(received.tolist()) for received in everyone]


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
