"""A Parameter that is not there: what foreign code reads in place of a codebook-held weight.

It knows the shape, and when torch is called with it in a place that the codebooks can serve (a linear map, a matrix
product, a convolution, a lookup, an einsum of two operands) it is never made. In any other place it becomes the
plain tensor for as long as that call needs it. No forward is traced or changed for this: every branch, flag, hook
and default argument of the module works as before (``docs/design/rewriting.md`` says why that was chosen).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpqfx.errors import RewriteError
from rpqfx.nn.weight import RPQWeight

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

    def __init__(self, weight: RPQWeight, flipped: bool = False) -> None:
        self._weight = weight
        self._flipped = flipped

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)  # nn.init passes it by name
        if isinstance(first, VirtualWeight) and _changes(getattr(func, "__name__", "")):
            return first._change(func.__name__)
        serve = _SERVED.get(func)
        if serve is not None:
            result = serve(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*[_dense(arg) for arg in args], **{key: _dense(value) for key, value in kwargs.items()})

    def expand_dense(self) -> Tensor:
        """The plain tensor."""
        dense = self._weight()
        return dense.t() if self._flipped else dense

    # What can be told without the tensor.

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        shape = self._weight.layout.shape
        return torch.Size(reversed(shape) if self._flipped else shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._weight.layout.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the codebooks."""
        return self._weight.codebooks.dtype

    @property
    def device(self) -> torch.device:
        """Of the codebooks."""
        return self._weight.codebooks.device

    @property
    def requires_grad(self) -> bool:
        """Of the codebooks."""
        return self._weight.codebooks.requires_grad

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
        return f"VirtualWeight({tuple(self.shape)}, {self._weight.extra_repr()})"

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
        if self.ndim != 2 or self._weight.layout.lead != 1:
            return self.expand_dense().t()
        return VirtualWeight(self._weight, not self._flipped)

    def transpose(self, first: int, second: int) -> Any:
        """As ``Tensor.transpose``."""
        if self.ndim == 2 and {first % 2, second % 2} == {0, 1}:
            return self.t()
        return self.expand_dense().transpose(first, second)

    @property
    def data(self) -> VirtualWeight:
        """Itself; what is changed in place through it is refused rather than lost."""
        return self

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


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: VirtualWeight, *args: Any) -> Any:
        return getattr(torch.Tensor, name)(self.expand_dense(), *[_dense(arg) for arg in args])

    return apply


_ARITHMETIC = ("add", "sub", "mul", "truediv", "pow")
_OTHERS = ("floordiv", "mod", "neg", "pos", "abs", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "iter")
for _name in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), *_OTHERS):
    setattr(VirtualWeight, f"__{_name}__", _operator(f"__{_name}__"))
VirtualWeight.__hash__ = object.__hash__  # type: ignore[method-assign]


def _dense(value: Any) -> Any:
    if isinstance(value, VirtualWeight):
        return value.expand_dense()
    if isinstance(value, (list, tuple)) and any(isinstance(item, VirtualWeight) for item in value):
        return type(value)([_dense(item) for item in value])
    return value


# ------------------------------------------------------------------------- the calls that codebooks can serve


def _apply(x: Tensor, weight: VirtualWeight, transpose: bool) -> Tensor:
    """``x @ weight``, or with ``transpose`` ``x @ weight.T``."""
    held = weight._weight
    return held.linear(x) if transpose != weight._flipped else held.linear_t(x)


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, VirtualWeight) and weight.ndim == 2 and weight._weight.layout.lead == 1


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_matrix(weight) or isinstance(input, VirtualWeight):
        return NotImplemented
    y = _apply(input, weight, transpose=True)
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(input: Any, other: Any) -> Any:
    if _is_matrix(other) and isinstance(input, Tensor):
        return _apply(input, other, transpose=False)
    if _is_matrix(input) and isinstance(other, Tensor):
        if other.dim() == 1:
            return _apply(other, input, transpose=True)
        return _apply(other.transpose(-1, -2), input, transpose=True).transpose(-1, -2)
    return NotImplemented


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    y = NotImplemented if isinstance(input, VirtualWeight) else _matmul(mat1, mat2)
    if y is NotImplemented:
        return y
    y = y if alpha == 1 else y * alpha
    return y + (input if beta == 1 else input * beta).to(y.dtype) if beta else y


def _einsum(equation: Any, *operands: Any) -> Any:
    """Two operands of which one is a codebook-held matrix that meets the other in exactly one axis."""
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return NotImplemented
    terms, out = equation.replace(" ", "").split("->")
    pairs = list(zip(terms.split(","), operands, strict=True))
    if isinstance(operands[0], VirtualWeight):
        pairs.reverse()
    (axes, x), (held, weight) = pairs
    if not _is_matrix(weight) or not isinstance(x, Tensor) or len(set(axes)) != len(axes) or len(set(held)) != 2:
        return NotImplemented
    summed, kept = (held[0], held[1]) if held[0] in axes else (held[1], held[0])
    rest = axes.replace(summed, "")
    if summed not in axes or summed in out or kept in axes or sorted(out) != sorted(rest + kept):
        return NotImplemented
    y = _apply(x.movedim(axes.index(summed), -1), weight, transpose=kept == held[0])
    return y.permute([(rest + kept).index(axis) for axis in out])


def _conv(spatial: int, transposed: bool) -> Callable[..., Any]:
    def every(value: Any) -> tuple[int, ...]:
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * spatial if len(value) == 1 else value

    def run(
        input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, rest: Any, groups: int
    ) -> Any:
        if not isinstance(weight, VirtualWeight) or weight._weight.layout.transposed:
            return NotImplemented
        if isinstance(input, VirtualWeight) or weight._weight.layout.lead != 1:
            return NotImplemented
        if isinstance(padding, str):
            if padding == "same" and every(stride) != (1,) * spatial:
                return NotImplemented  # torch's own error
            if padding == "same":
                taps = zip(every(dilation), weight.shape[2:], strict=True)
                totals = [d * (k - 1) for d, k in taps]
                input = F.pad(input, [side for t in reversed(totals) for side in (t // 2, t - t // 2)])
            elif padding != "valid":
                return NotImplemented
            padding = 0
        return weight._weight.conv(
            input, bias, every(stride), every(padding), every(dilation), groups, transposed, every(rest)
        )

    def plain(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        return run(input, weight, bias, stride, padding, dilation, 0, groups)

    def transpose(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        return run(input, weight, bias, stride, padding, dilation, output_padding, groups)

    return transpose if transposed else plain


def _embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if not _is_matrix(weight) or weight._flipped or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    held = weight._weight
    rows = held.lookup(input, sparse)
    if padding_idx is None or padding_idx % held.layout.rows == held.layout.zero_vector:
        return rows
    return torch.where((input == padding_idx % held.layout.rows)[..., None], rows.detach(), rows)


_SERVED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv1d: _conv(1, False),
    F.conv2d: _conv(2, False),
    F.conv3d: _conv(3, False),
    F.conv_transpose1d: _conv(1, True),
    F.conv_transpose2d: _conv(2, True),
    F.conv_transpose3d: _conv(3, True),
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.einsum: _einsum,
}
