"""Calls that need the tensor itself: it is computed for the call, and again for the call's backward.

Whatever such a call asks autograd to keep is kept, but for the tensor and views of it: of those a recipe is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError


class Remade:
    """A tensor that can be computed again from its operands.

    Args:
        tensor: The tensor, as long as the call takes.
        make: Makes an equal one.
        sources: The tensors that it is made of; changing one in place before backward is an error, as for a saved one.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor], sources: Sequence[Tensor]) -> None:
        try:
            self.storage = tensor.untyped_storage().data_ptr()
        except RuntimeError:  # wrappers of torch.func and of tracers have no memory; with them there are no hooks
            self.storage = 0
        self.dtype = tensor.dtype
        self._stride = tensor.stride()
        self._make = make
        self._sources = sources
        self._versions = [source._version for source in sources]
        self._again: Tensor | None = None

    def again(self) -> Tensor:
        """Returns the tensor; made once for all that one backward unpacks, and gone with the last of it."""
        if self._again is None:
            if [source._version for source in self._sources] != self._versions:
                raise InputError(
                    "codebooks were changed in place between a forward and its backward; "
                    "step the optimizer after backward, or run the forward again"
                )
            with torch.no_grad():
                self._again = self._make()
            assert self._again.stride() == self._stride, "the tensor computed again has other strides"
        return self._again


@dataclass(frozen=True)
class _View:
    """A view of a remade tensor, as autograd keeps it."""

    of: Remade
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextlib.contextmanager
def not_kept(made: Sequence[Remade]) -> Iterator[None]:
    """While it lasts, autograd keeps recipes in place of these tensors and of views of them.

    Under torch.compile, which decides itself what to compute again, and under torch.func, which allows no hooks, it
    does nothing.

    Args:
        made: The tensors.
    """
    by_storage = {(one.storage, one.dtype): one for one in made if one.storage}
    if not by_storage:
        yield
        return
    around = _hooks_around()

    def pack(tensor: Tensor) -> Any:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        found = by_storage.get((tensor.untyped_storage().data_ptr(), tensor.dtype)) if plain else None
        if found is not None:
            return _View(found, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor if around is None else _Packed(around[0](tensor), around[1])

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _unpack))
        yield


@dataclass(frozen=True)
class _Packed:
    """A tensor that is not ours, as the hooks around these keep it: those of a checkpoint, or of moving to the CPU."""

    kept: Any
    unpack: Callable[[Any], Tensor]


def _hooks_around() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Returns the hooks that are in force, of which torch would ask the innermost only."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _View):
        return kept.of.again().as_strided(kept.size, kept.stride, kept.offset)
    return kept.unpack(kept.kept) if isinstance(kept, _Packed) else kept
