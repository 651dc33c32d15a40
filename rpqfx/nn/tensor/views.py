"""Views of a quantized tensor: parts of the codes where that can be, and otherwise a note of what to view later."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from rpqfx.codebook import range_of
from rpqfx.nn.layout import Layout
from rpqfx.nn.weight import RPQWeight
from rpqfx.nn.weight_slice import Part

# Views of which codebooks know nothing, and which are therefore taken of the tensor when it is made.
LATE = ("unsqueeze", "expand", "unflatten", "movedim", "swapaxes", "swapdims", "view_as", "expand_as", "diagonal")

Late = tuple[str, tuple[Any, ...], dict[str, Any]]

TRACING: ContextVar[bool] = ContextVar("rpqfx.nn.tensor.views.tracing", default=False)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """While this thread traces a model symbolically: views are taken of the whole tensor, a node of the graph."""
    token = TRACING.set(True)
    try:
        yield
    finally:
        TRACING.reset(token)


class Views:
    """A quantized tensor seen through views.

    Args:
        weight: The codebooks.
        part: The part of them that this is; all, if left out.
        order: The axes of the part, in the order they have here.
        views: Further views, as (method, arguments, keywords), of which codebooks know nothing.
    """

    def __init__(
        self,
        weight: RPQWeight,
        part: Part | None = None,
        order: tuple[int, ...] | None = None,
        views: tuple[Late, ...] = (),
    ) -> None:
        self.held = weight
        self.part = weight.part() if part is None else part
        self.order = tuple(range(len(self.part.layout.shape))) if order is None else order
        self.views = views

    @property
    def tracing(self) -> bool:
        """Whether a symbolic trace is going on, in which the whole tensor is a node and all views are taken of it."""
        return not torch.compiler.is_compiling() and TRACING.get()  # compilers cannot read a context variable

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or the transpose of one, that codebooks hold."""
        return len(self.order) == 2 and not self.views and self.part.layout.lead == 1

    @property
    def flipped(self) -> bool:
        """Whether it is the transpose of what the codebooks hold."""
        return self.order != tuple(range(len(self.order)))

    @property
    def is_whole(self) -> bool:
        """Whether it is all of a quantized tensor, as it is."""
        return not self.part.path and not self.flipped and not self.views

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        shape = self.part.layout.shape
        shape = torch.Size([shape[axis] for axis in self.order])
        if not self.views:
            return shape
        like = torch.empty(shape, device="meta")
        for view, args, kwargs in self.views:
            like = getattr(like, view)(*args, **kwargs)
        return like.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape) if self.views else len(self.order)

    @property
    def T(self) -> Any:
        """The transpose."""
        return self.permute(list(range(self.ndim))[::-1])

    @property
    def mT(self) -> Any:
        """The transpose of the last two axes."""
        return self.transpose(-2, -1)

    def t(self) -> Any:
        """Returns the transpose."""
        return self.transpose(0, 1) if self.ndim == 2 else self._view("t")

    def transpose(self, dim0: int, dim1: int) -> Any:
        """As ``Tensor.transpose``."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(*order)

    def permute(self, *dims: Any) -> Any:
        """As ``Tensor.permute``."""
        order = [dim % self.ndim for dim in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)]
        if self.views or sorted(order) != list(range(self.ndim)):
            return self._view("permute", *dims)
        return type(self)(self.held, self.part, tuple([self.order[axis] for axis in order]))

    def narrow(self, dim: int, start: int, length: int) -> Any:
        """As ``Tensor.narrow``."""
        start = start + self.shape[dim] if start < 0 else start
        if start < 0 or length < 0 or start + length > self.shape[dim]:
            return self._call("narrow", dim, start, length)  # torch's own error
        return self[(slice(None),) * (dim % self.ndim) + (slice(start, start + length),)]

    def select(self, dim: int, index: int) -> Any:
        """As ``Tensor.select``."""
        return self[(slice(None),) * (dim % self.ndim) + (index,)]

    def split(self, split_size: Any, dim: int = 0) -> tuple[Any, ...]:
        """As ``Tensor.split``."""
        size = self.shape[dim]
        if isinstance(split_size, int):
            split_size = [min(split_size, size - start) for start in range(0, size, max(1, split_size))]
        if sum(split_size) != size or min(split_size) < 0:
            return self._call("split", split_size, dim)  # torch's own error
        starts = [sum(split_size[:i]) for i in range(len(split_size))]
        return tuple([self.narrow(dim, start, length) for start, length in zip(starts, split_size, strict=True)])

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Any, ...]:
        """As ``Tensor.chunk``."""
        return self.split(max(1, -(-self.shape[dim] // chunks)), dim)

    def unbind(self, dim: int = 0) -> Any:
        """As ``Tensor.unbind``; the matrices of experts stay virtual."""
        if self.tracing or self.views or not self.part.layout.experts or self.order[dim] != 0:
            return self._call("unbind", dim)
        order = _without(self.order, dim % 3)
        return tuple([type(self)(self.held, one, order) for one in self.part.experts()])

    def squeeze(self, dim: Any = None) -> Any:
        """As ``Tensor.squeeze``."""
        shape = self.shape
        dims = range(len(shape)) if dim is None else (dim,) if isinstance(dim, int) else dim
        axes = [axis % len(shape) for axis in dims]
        gone = {axis for axis in axes if shape[axis] == 1}
        return self[tuple([0 if axis in gone else slice(None) for axis in range(len(shape))])] if gone else self

    def reshape(self, *shape: Any) -> Any:
        """As ``Tensor.reshape``."""
        sizes = tuple(shape[0]) if shape and isinstance(shape[0], (tuple, list)) else shape
        layout = self.part.layout
        if not all([isinstance(size, int) for size in sizes]):  # view(dtype)
            return self._call("view", *shape)
        known = math.prod([size for size in sizes if size != -1])
        sizes = tuple([self.shape.numel() // known if size == -1 and known else size for size in sizes])
        if sizes == tuple(self.shape):
            return self
        if not (self.tracing or self.views or self.flipped or layout.experts) and sizes == (layout.rows, layout.cols):
            matrix = Layout(sizes, 1, layout.transposed, layout.zero_vector)
            return type(self)(self.held, self.part.seen_as(matrix))
        if self.is_matrix and not (self.tracing or self.flipped) and (experts := self._experts(sizes)) is not None:
            return type(self)(self.held, self.part.seen_as(experts))
        return self._view("reshape", *shape)

    view = reshape

    def _experts(self, sizes: tuple[int, ...]) -> Layout | None:
        """Returns a matrix whose rows are those of several experts, as a matrix for each."""
        layout = self.part.layout
        if len(sizes) != 3 or sizes[2] != layout.cols or layout.zero_vector is not None:
            return None
        experts = Layout(sizes, 1, layout.transposed, None, "own" if layout.transposed else "shared")
        _, books, _, d = self.part.tensors.codebooks.shape
        apart = experts.unit % d == 0 and (books == 1 or books % sizes[0] == 0)
        return experts if not layout.transposed or apart else None

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        """As ``Tensor.flatten``."""
        first, last = start_dim % self.ndim, end_dim % self.ndim
        shape = self.shape
        return self.reshape(*shape[:first], -1, *shape[last + 1 :])

    def __getitem__(self, index: Any) -> Any:
        return _indexed(self, index)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the tensor."""
        if self.tracing:
            return getattr(self.expand_dense(), name)(*args, **kwargs)  # type: ignore[attr-defined]
        return type(self).answer(getattr(Tensor, name), (self, *args), kwargs)  # type: ignore[attr-defined]

    def _view(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns a view that codebooks do not serve; a graph that is being made takes it of the tensor."""
        if torch.compiler.is_compiling():
            return self._call(name, *args, **kwargs)
        late = type(self)(self.held, self.part, self.order, (*self.views, (name, args, kwargs)))
        if not self.tracing:
            _ = late.shape  # raises what torch raises, here rather than later
        return late


def _indexed(weight: Views, index: Any) -> Any:
    """``weight[index]``: a part of the codebooks, or a view for later, or the elements of the tensor."""
    items = index if isinstance(index, tuple) else (index,)
    basic = all([item is None or item is Ellipsis or _is_range(item) for item in items])
    if not weight.views and not weight.tracing and all([item is not None for item in items]):
        found = _parts(weight, items)
        if found is not None:
            return found
    return weight._view("__getitem__", index) if basic else weight._call("__getitem__", index)


def _is_range(item: Any) -> bool:
    return isinstance(item, slice) or (isinstance(item, int) and not isinstance(item, bool))


def _parts(weight: Views, items: tuple[Any, ...]) -> Views | None:
    """Returns the part that ranges and numbers of axes name, or of a tensor of experts some experts."""
    part, order = weight.part, weight.order
    chosen = [item for item in items if isinstance(item, Tensor)]
    if chosen:
        one = chosen[0]
        whole = all([isinstance(item, slice) and item == slice(None) for item in items[1:]])
        if one is not items[0] or not whole or not part.layout.experts or order[0] != 0 or not _are_ids(one):
            return None
        ids = one.reshape(-1)
        taken = part.take(torch.where(ids < 0, ids + part.layout.shape[0], ids))
        if one.dim() == 1:
            return type(weight)(weight.held, taken, order)
        alone = taken.drop(0)
        return None if alone is None else type(weight)(weight.held, alone, _without(order, 0))
    gaps = [place for place, item in enumerate(items) if item is Ellipsis]
    if gaps:
        items = (*items[: gaps[0]], *[slice(None)] * (len(order) - len(items) + 1), *items[gaps[0] + 1 :])
    if len(items) > len(order) or not all([_is_range(item) for item in items]):
        return None
    for place in reversed(range(len(items))):  # from the last axis, so that those before keep their numbers
        item, axis = items[place], order[place]
        size = part.layout.shape[axis]
        if isinstance(item, int) and not -size <= item < size:
            return None  # torch's own error
        start, stop, step = (item % size, item % size + 1, 1) if isinstance(item, int) else range_of(item, size)
        some = None if step != 1 else part.narrow(axis, start, max(0, stop - start))
        some = some.drop(axis) if some is not None and isinstance(item, int) else some
        if some is None:
            return None
        part, order = some, _without(order, place) if isinstance(item, int) else order
    return type(weight)(weight.held, part, order)


def _are_ids(ids: Tensor) -> bool:
    return ids.dim() < 2 and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def _without(order: tuple[int, ...], place: int) -> tuple[int, ...]:
    """Returns the order of the axes that are left when one goes."""
    gone = order[place]
    return tuple([axis - int(axis > gone) for axis in order if axis != gone])
