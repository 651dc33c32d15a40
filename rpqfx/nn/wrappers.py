"""Modules that stand around a model without being part of it, and the model within.

torch.compile, DataParallel, DistributedDataParallel, averages of weights and activation checkpointing put a model into
a module of theirs, and its tensors then have a name more. What is saved, reported and decided goes by the names that
the model itself has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from rpqfx.errors import RewriteError
from rpqfx.nn.shards import is_shard

# The child that holds the model, by the wrapper's class. Classes go by name: importing some of them takes long.
_CHILD = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
}
_WRAPPERS = {name.rpartition(".")[2] for name in _CHILD}
_DISTRIBUTED = "torch.nn.parallel.distributed.DistributedDataParallel"
_SHARDED = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.fsdp.FSDPModule",
    "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model within wrappers; the model itself where there are none.

    Args:
        model: Any module.
    """
    while (child := _child(model)) is not None:
        model = model.get_submodule(child)
    return model


def rewrapped(model: nn.Module, within: nn.Module) -> nn.Module:
    """Returns a wrapper like another around another model.

    Args:
        model: A wrapper.
        within: The model that is to be in it, in place of ``unwrapped(model)``.

    Returns:
        ``model`` itself where that is what it holds, else a copy of its wrappers around ``within``.
    """
    inner = unwrapped(model)
    return model if within is inner else copy.deepcopy(model, {id(inner): within})


def modules_within(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yields every module of a model that is no wrapper, under the names that it has without wrappers.

    Args:
        model: Any module, with wrappers around it or around parts of it.

    Yields:
        The name without wrappers, the name as ``get_submodule`` takes it, and the module; one that has several names
        comes as often.
    """
    own = {"": ""}
    hides: dict[str, str | None] = {}  # the child that each module is a wrapper of
    for path, module in model.named_modules(remove_duplicate=False):
        above, _, name = path.rpartition(".")
        if path:
            parent = own[above]
            own[path] = parent if hides[above] == name else f"{parent}.{name}".lstrip(".")
        hides[path] = _child(module)
        if hides[path] is None:
            yield own[path], path, module


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the wrappers around a model and around parts of it.

    Args:
        model: Any module.
    """
    return (module for module in model.modules() if _child(module) is not None)


def names_within(model: nn.Module) -> dict[str, str]:
    """Names of modules as ``get_submodule`` takes them, by the names that they have without wrappers.

    Args:
        model: Any module.
    """
    return {name: path for name, path, _ in modules_within(model)}


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raises where a model holds tensors of which each process has a part.

    Args:
        model: Any module.
        what: Name of the operation, for the message.

    Raises:
        RewriteError: If the model, or a part of it, is sharded by FSDP or split by tensor parallelism.
    """
    for path, module in model.named_modules():
        fsdp = bool(_SHARDED & _classes(module))
        if fsdp or any(p is not None and is_shard(p) for p in module._parameters.values()):
            raise RewriteError(
                f"{what} needs whole tensors, and {'FSDP shards' if fsdp else 'processes have parts of'} those of "
                f"{path or 'the model'} ({type(module).__name__}): load its full state dict "
                "(torch.distributed.checkpoint.state_dict, full_state_dict=True) into a model that is not sharded"
            )


def refuse_distributed(model: nn.Module, what: str) -> None:
    """Raises where a model's gradients are added up over processes by something that knows its Parameters.

    Args:
        model: Any module.
        what: Name of the operation, for the message.

    Raises:
        RewriteError: If the model, or a part of it, is in DistributedDataParallel or sharded by FSDP.
    """
    refuse_sharded(model, what)
    for path, module in model.named_modules():
        if _DISTRIBUTED in _classes(module):
            raise RewriteError(
                f"{what} changes Parameters, and {path or 'the model'} is in DistributedDataParallel, which adds up "
                "gradients of those that it knows: hand in its .module, and wrap the result"
            )


def _child(module: nn.Module) -> str | None:
    classes = (base for base in type(module).__mro__ if base.__qualname__ in _WRAPPERS)  # most have none of these names
    names = (f"{base.__module__}.{base.__qualname__}" for base in classes)
    return next((_CHILD[name] for name in names if name in _CHILD), None)


def _classes(module: nn.Module) -> set[str]:
    return {f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__}
