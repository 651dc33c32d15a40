"""A Parameter that is not there: what foreign code reads in place of a codebook-held weight.

It knows the shape, and when torch is called with it in a place that the codebooks can serve (a linear map, a matrix
product, a convolution, a lookup, an einsum of two operands) it is never made. In any other place it becomes the
plain tensor for as long as that call needs it. No forward is traced or changed for this: every branch, flag, hook
and default argument of the module works as before (``docs/design/rewriting.md`` says why that was chosen).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rpqfx.errors import RewriteError
from rpqfx.nn.resize import resize_rows
from rpqfx.nn.weight import RPQWeight

# What ``rpqfx.nn.served`` puts here: by torch function, one that takes its arguments and returns its result, or
# NotImplemented where only the plain tensor will do.
SERVED: dict[Any, Callable[..., Any]] = {}

_initialising = False


@contextlib.contextmanager
def initialising() -> Iterator[None]:
    """For a while, changing a virtual weight in place does nothing: its codebooks have been drawn already."""
    global _initialising
    before, _initialising = _initialising, True
    try:
        yield
    finally:
        _initialising = before


def _changes(name: str) -> bool:
    """Whether a torch function or method works in place, by torch's own convention."""
    return name.endswith("_") and not name.endswith("__")


class VirtualWeight:
    """A codebook-held tensor, or the transpose of one, that torch functions accept in place of a tensor.

    Args:
        weight: The codebooks.
        flipped: Whether this is the transpose of a two-dimensional tensor.
    """

    _is_hf_initialized = True  # by which transformers' initialisers leave it alone: its codebooks have been drawn

    def __init__(self, weight: RPQWeight, flipped: bool = False) -> None:
        self.held = weight
        self.flipped = flipped

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)  # nn.init passes it by name
        if isinstance(first, VirtualWeight) and _changes(getattr(func, "__name__", "")):
            return first._change(func.__name__)
        serve = SERVED.get(func)
        if serve is not None:
            result = serve(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*[_dense(arg) for arg in args], **{key: _dense(value) for key, value in kwargs.items()})

    def expand_dense(self) -> Tensor:
        """The plain tensor."""
        dense = self.held()
        return dense.t() if self.flipped else dense

    # What can be told without the tensor.

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        shape = self.held.layout.shape
        return torch.Size(reversed(shape) if self.flipped else shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.held.layout.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the codebooks."""
        return self.held.codebooks.dtype

    @property
    def device(self) -> torch.device:
        """Of the codebooks."""
        return self.held.codebooks.device

    @property
    def requires_grad(self) -> bool:
        """Of the codebooks."""
        return self.held.codebooks.requires_grad

    def size(self, dim: int | None = None) -> Any:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of axes."""
        return self.ndim

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"VirtualWeight({tuple(self.shape)}, {self.held.extra_repr()})"

    # Transposes, as long as nothing needs the tensor.

    @property
    def T(self) -> Any:
        """The transpose."""
        return self.t() if self.ndim == 2 else self.expand_dense().T

    @property
    def mT(self) -> Any:
        """The transpose of the last two axes."""
        return self.t() if self.ndim == 2 else self.expand_dense().mT

    def t(self) -> Any:
        """The transpose."""
        if self.ndim != 2 or self.held.layout.lead != 1:
            return self.expand_dense().t()
        return VirtualWeight(self.held, not self.flipped)

    def transpose(self, first: int, second: int) -> Any:
        """As ``Tensor.transpose``."""
        if self.ndim == 2 and {first % 2, second % 2} == {0, 1}:
            return self.t()
        return self.expand_dense().transpose(first, second)

    @property
    def data(self) -> VirtualWeight:
        """Itself; what is changed in place through it is refused rather than lost."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        """More or fewer rows, as tables of tokens get; other values are refused."""
        if self.flipped:
            self._change("data")
        resize_rows(self.held, _dense(value))

    def contiguous(self) -> VirtualWeight:
        """Itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where nothing changes, else the converted tensor."""
        if kwargs or len(args) != 1 or args[0] not in (self.dtype, self.device):
            return self.expand_dense().to(*args, **kwargs)
        return self

    def __matmul__(self, other: Any) -> Any:
        return VirtualWeight.__torch_function__(torch.matmul, (), (self, other))

    def __rmatmul__(self, other: Any) -> Any:
        return VirtualWeight.__torch_function__(torch.matmul, (), (other, self))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by copying, pickling and compilers, before there is anything to expand
            raise AttributeError(name)
        if _changes(name):
            return lambda *args, **kwargs: self._change(name)
        return getattr(self.expand_dense(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._change("__setitem__")

    def _change(self, name: str) -> VirtualWeight:
        """Refuses to change in place what is made anew at each read, and would be lost."""
        if _initialising:
            return self
        raise RewriteError(
            f"{name} would change a weight that is held in codebooks and made anew at each read; "
            "change its codebooks, or leave this layer dense with a Rule"
        )


def _operator(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def apply(self: VirtualWeight, *args: Any) -> Any:
        values = (self.expand_dense(), *(_dense(arg) for arg in args))
        return function(*reversed(values)) if swapped else function(*values)

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(VirtualWeight, f"__r{_name}__", _operator(getattr(operator, _name), swapped=True))
    setattr(VirtualWeight, f"__{_name}__", _operator(getattr(operator, _name)))
for _name in ("floordiv", "mod", "neg", "pos", "abs", "lt", "le", "gt", "ge", "eq", "ne", "getitem"):
    setattr(VirtualWeight, f"__{_name}__", _operator(getattr(operator, _name)))
setattr(VirtualWeight, "__iter__", _operator(iter))  # noqa: B010
VirtualWeight.__hash__ = object.__hash__  # type: ignore[method-assign]


def _dense(value: Any) -> Any:
    if isinstance(value, VirtualWeight):
        return value.expand_dense()
    if isinstance(value, (list, tuple)) and any(isinstance(item, VirtualWeight) for item in value):
        return type(value)([_dense(item) for item in value])
    return value
