"""Parameters that are quantized, as properties of their modules: reading, tying, and refusing the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rpqfx.errors import DistributedError, RewriteError
from rpqfx.nn.shards import is_shard
from rpqfx.nn.tensor import served as _served  # noqa: F401 (fills the table of calls that virtual weights serve)
from rpqfx.nn.tensor.expanded import ExpandedWeight, FixedWeight, with_notes
from rpqfx.nn.tensor.virtual import VirtualWeight
from rpqfx.nn.weight import RPQWeight

SUFFIX = "_rpq"


class Backed(nn.Module):
    """Base of every module that holds at least one Parameter in codebooks."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuses to lay a dense Parameter over one that is quantized; one that is read so is tied."""
        read: type = type(param)
        if read in (ExpandedWeight, FixedWeight, VirtualWeight):  # Parameters are instances of these, too
            if weight_of(self, name) is None:
                raise RewriteError(
                    f"{type(self).__name__} cannot register {name!r}: it was read from a quantized weight, "
                    "which is computed anew at each read. Prune, normalise or parametrise a weight before the model "
                    "is rewritten"
                )
            _tie(name)(self, param)
            return
        if param is not None and is_shard(param) and backed_weights(self):
            raise DistributedError(
                f"{type(self).__name__} holds {', '.join(backed_weights(self))} quantized, which torch's styles of "
                "tensor parallelism cannot split; use those of the same names in rpqfx.distributed (ColwiseParallel, "
                "RowwiseParallel) in the plan of parallelize_module, which take dense modules as well"
            )
        if name + SUFFIX in self.__dict__.get("_modules", {}):
            raise _fixed(self, name)
        super().register_parameter(name, param)

    def _adopt(self) -> None:
        """Called when Parameters have moved into codebooks, to drop what else kept them."""


def _fixed(module: nn.Module, name: str) -> RewriteError:
    return RewriteError(
        f"{type(module).__name__}.{name} is quantized and cannot be assigned or deleted; "
        f"train or load {name}{SUFFIX}, change it before rewriting, or build the layer anew with from_dense"
    )


def weight_of(module: nn.Module, name: str) -> RPQWeight | None:
    """Returns the codebooks that hold a module's Parameter, or None where it is dense.

    Args:
        module: Any module.
        name: Name of the Parameter.
    """
    found = module._modules.get(name + SUFFIX)
    return found if isinstance(found, RPQWeight) else None


def backed_weights(module: nn.Module) -> dict[str, RPQWeight]:
    """Returns every Parameter of a module itself that is quantized, by the Parameter's name."""
    return {
        name.removesuffix(SUFFIX): child
        for name, child in module._modules.items()
        if name.endswith(SUFFIX) and isinstance(child, RPQWeight)
    }


def held(name: str, plain_when_compiled: bool = False) -> property:
    """Returns a property that reads a Parameter wherever it is held.

    Args:
        name: Name of the Parameter.
        plain_when_compiled: Whether compiled code is to read a plain tensor.

    Returns:
        The property. Each read computes its value, of the kind that ``RPQWeight.read_as`` names.
    """

    def read(self: nn.Module) -> Any:
        weight = weight_of(self, name)
        if weight is None:
            return self._parameters[name]
        if weight.read_as == "expanded":
            return ExpandedWeight.of(weight)
        if weight.read_as == "tensor":
            return FixedWeight.of(weight)
        plain = plain_when_compiled or weight.plain_when_compiled
        return with_notes(weight(), weight) if plain and torch.compiler.is_compiling() else VirtualWeight(weight)

    def delete(self: nn.Module) -> None:
        raise _fixed(self, name)

    return property(read, _tie(name), delete, doc=f"``{name}``, quantized and computed anew at each read.")


def _tie(name: str) -> Callable[[nn.Module, Any], None]:
    """Ties another module's quantized tensor where one is assigned to such a property, and refuses anything else."""

    def write(self: nn.Module, value: Any) -> None:
        read = value._virtual if type(value) in (ExpandedWeight, FixedWeight) else value
        if not isinstance(read, VirtualWeight) or not read.is_whole:
            raise _fixed(self, name)
        self._modules[name + SUFFIX] = read.held

    return write
