"""A Parameter that is not there: what foreign code reads in place of a quantized weight.

It knows the shape, and when torch is called with it in a place that the codebooks can serve (a linear map, a matrix
product, a convolution, a lookup, an einsum of two operands) it is never made. Views of it, such as slices, chunks, one
expert's matrix or a transpose, are virtual too. In any other place it becomes the plain tensor for as long as that
call needs it, and again for the call's backward. No forward is traced or changed for this: every branch, flag, hook and
default argument of the module works as before (``docs/design/rewriting.md`` says why that was chosen).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from rpqfx.nn.placement import refuse_meta
from rpqfx.nn.resize import multiply, resize_rows
from rpqfx.nn.tensor.facts import Facts
from rpqfx.nn.tensor.readonly import call, check_for_good, refused
from rpqfx.nn.tensor.recomputed import Remade, not_kept
from rpqfx.nn.tensor.views import LATE
from rpqfx.nn.weight_slice import Part

# What ``rpqfx.nn.tensor.served`` puts here: by torch function, one that takes its arguments and returns its result, or
# NotImplemented where only the plain tensor will do.
SERVED: dict[Any, Callable[..., Any]] = {}

INITIALISING: ContextVar[bool] = ContextVar("rpqfx.nn.tensor.virtual.initialising", default=False)


@contextlib.contextmanager
def initialising() -> Iterator[None]:
    """For a while, in this thread, changing a virtual weight in place does nothing: its codebooks have been drawn."""
    token = INITIALISING.set(True)
    try:
        yield
    finally:
        INITIALISING.reset(token)


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
CHANGING_OPERATORS = ("__setitem__", *[f"__i{name}__" for name in _OPERATORS])


def changes(name: str) -> bool:
    """Returns whether a torch function or method of this name works in place, by torch's own convention."""
    return (name.endswith("_") and not name.endswith("__")) or name in CHANGING_OPERATORS


# Functions that work in place, with their names; a table, because compilers cannot ask a function for its name.
CHANGES = {
    getattr(place, name): name
    for place in (torch, Tensor, torch.nn.functional, torch.nn.init)
    for name in dir(place)
    if changes(name) and callable(getattr(place, name))
}


class VirtualWeight(Facts):
    """A quantized tensor, or a view of one, that torch functions accept in place of a tensor.

    Args:
        weight: The codebooks.
        part: The part of them that this is; all, if left out.
        order: The axes of the part, in the order they have here.
        views: Further views, as (method, arguments, keywords), of which codebooks know nothing.
    """

    _is_hf_initialized = True  # by which transformers' initialisers leave it alone: its codebooks have been drawn

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)  # nn.init passes it by name
        if isinstance(first, VirtualWeight) and func in CHANGES:
            return first.change(CHANGES[func], *args[1:])
        return cls.answer(func, args, kwargs)

    @classmethod
    def answer(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of a function that changes nothing in place."""
        serve = SERVED.get(func)
        if serve is not None:
            result = serve(*args, **kwargs)
            if result is not NotImplemented:
                return result
        check_for_good(func, args)
        check_values([*args, *kwargs.values()])
        made: list[Remade] = []
        dense: list[Tensor] = []
        plain = [as_dense(arg, made, dense) for arg in args]
        named = {key: as_dense(value, made, dense) for key, value in kwargs.items()}
        if torch.compiler.is_compiling():
            return func(*plain, **named)
        with not_kept(made):
            return call(func, plain, named, dense)

    def expand_dense(self) -> Tensor:
        """Returns the plain tensor."""
        if self.tracing:
            dense = self.held()
        else:
            dense = self.part.dense().contiguous()  # as a Parameter is: foreign code may view it
        if self.order != tuple(range(len(self.order))):
            dense = dense.permute(self.order)
        for view, args, kwargs in self.views:
            dense = getattr(dense, view)(*args, **kwargs)
        return dense

    def remade(self, tensor: Tensor) -> Remade:
        """Returns how its plain tensor, as ``expand_dense`` gave it, is computed again."""
        part = self.part
        fixed = part.tensors.detach()
        again = VirtualWeight(self.held, Part(fixed, part.layout), self.order, self.views)
        return Remade(tensor, again.expand_dense, [t for t in fixed if isinstance(t, Tensor)])

    @property
    def data(self) -> VirtualWeight:
        """Itself; what is changed in place through it is refused rather than lost."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        """More or fewer rows, as tables of tokens get; other values are refused."""
        if not self.is_whole:
            self.refuse("data")
        read = getattr(value, "_virtual", value)
        if isinstance(read, VirtualWeight):
            if read.is_whole and read.held is self.held:  # as after ``weight.data *= 2``
                return
            value = read.expand_dense()
        resize_rows(self.held, value)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        """Returns itself, or where its axes have another order, the tensor."""
        if memory_format is torch.contiguous_format and not self.flipped:
            return self
        return self._call("contiguous", memory_format=memory_format)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Returns itself where nothing changes, else the converted tensor."""
        if kwargs or len(args) != 1 or args[0] not in (self.dtype, self.device):
            return self._call("to", *args, **kwargs)
        return self

    # Everything else.

    def __matmul__(self, other: Any) -> Any:
        return VirtualWeight.__torch_function__(torch.matmul, (), (self, other))

    def __rmatmul__(self, other: Any) -> Any:
        return VirtualWeight.__torch_function__(torch.matmul, (), (other, self))

    def __getattr__(self, name: str) -> Any:
        if "held" in self.__dict__ and name in self.held.noted:
            return self.noted(name)
        if name.startswith("_"):  # asked for by copying, pickling and compilers, before there is anything to expand
            raise AttributeError(name)
        if changes(name):
            return lambda *args, **kwargs: self.change(name, *args)
        if name in LATE:
            return lambda *args, **kwargs: self._view(name, *args, **kwargs)
        if callable(getattr(Tensor, name, None)):
            return lambda *args, **kwargs: self._call(name, *args, **kwargs)
        return getattr(self.expand_dense(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("held", "part", "order", "views") or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            self.note(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.refuse("__setitem__")

    def change(self, name: str, *args: Any) -> VirtualWeight:
        """Changes the tensor in place: all of it may be multiplied by a number; anything else is refused."""
        number = len(args) == 1 and isinstance(args[0], (int, float)) and self.is_whole
        if not number or name not in ("mul_", "div_", "__imul__", "__itruediv__"):
            return self.refuse(name)
        multiply(self.held, args[0] if "mul" in name else 1 / args[0])
        return self

    def refuse(self, name: str) -> VirtualWeight:
        """Refuses to change in place a tensor that is computed at each read, where the change would be lost."""
        if not torch.compiler.is_compiling() and INITIALISING.get():
            return self
        raise refused(name)


def _operator(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    def apply(self: VirtualWeight, *args: Any) -> Any:
        made: list[Remade] = []
        check_values([self, *args])
        values = (as_dense(self, made, []), *[as_dense(arg, made, []) for arg in args])
        with not_kept(made):
            return function(*reversed(values)) if swapped else function(*values)

    return apply


def _inplace(name: str) -> Callable[..., Any]:
    return lambda self, *args: self.change(name, *args)


for _name in CHANGING_OPERATORS[1:]:
    setattr(VirtualWeight, _name, _inplace(_name))
for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(VirtualWeight, f"__r{_name}__", _operator(getattr(operator, _name), swapped=True))
    setattr(VirtualWeight, f"__{_name}__", _operator(getattr(operator, _name)))
for _name in ("floordiv", "mod", "neg", "pos", "abs", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(VirtualWeight, f"__{_name}__", _operator(getattr(operator, _name)))
VirtualWeight.__hash__ = object.__hash__  # type: ignore[method-assign]


def check_values(values: Sequence[Any]) -> None:
    """Raises InputError where a virtual weight on the meta device is used with tensors that have no values."""
    for value in values:
        if isinstance(value, (list, tuple)) and any([isinstance(item, VirtualWeight) for item in value]):
            check_values([*value, *[other for other in values if other is not value]])
        elif isinstance(value, VirtualWeight) and value.part.lasting and value.device.type == "meta":
            refuse_meta(value.held, value.part.tensors, values)


def as_dense(value: Any, made: list[Remade], plain: list[Tensor]) -> Any:
    """Returns a value with the plain tensor in place of a virtual weight.

    Args:
        value: Any argument of a function; of lists, items are looked at.
        made: Receives the recipe by which the tensor is computed again.
        plain: Takes the tensor.
    """
    if isinstance(value, VirtualWeight):
        dense = value.expand_dense()
        plain.append(dense)
        graph = value.tracing or torch.compiler.is_compiling()
        if torch.is_grad_enabled() and value.part.lasting and not graph and not dense.is_inference():
            made.append(value.remade(dense))
        return dense
    if isinstance(value, (list, tuple)) and any([isinstance(item, VirtualWeight) for item in value]):
        return type(value)([as_dense(item, made, plain) for item in value])
    return value
