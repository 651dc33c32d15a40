"""The expanded tensor that people read as a layer's weight, which knows where it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.nn.tensor.readonly import call, check_for_good
from rpqfx.nn.tensor.recomputed import not_kept
from rpqfx.nn.tensor.virtual import CHANGES, CHANGING_OPERATORS, SERVED, VirtualWeight, changes, check_values
from rpqfx.nn.weight import RPQWeight

_SETTERS = {Tensor.data.__set__: "data", Tensor.requires_grad.__set__: "requires_grad"}  # type: ignore[attr-defined]


_TRANSPOSES = {Tensor.t: "t", torch.t: "t", Tensor.transpose: "transpose", torch.transpose: "transpose"}
_TRANSPOSES |= {Tensor.T.__get__: "T", Tensor.mT.__get__: "mT"}  # type: ignore[attr-defined]


def with_notes(dense: Tensor, weight: RPQWeight) -> Tensor:
    """Returns a plain tensor with the attributes that somebody gave the Parameter it stands for.

    Args:
        dense: The tensor.
        weight: The codebooks that it was made of.
    """
    for name, value in weight.noted.items():
        setattr(dense, name, value)
    return dense


class _Related(type(Tensor)):  # type: ignore[misc]
    """Parameters count as related: torch.testing compares tensors of related classes only."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or type(instance) is nn.Parameter


class _Read(Tensor, metaclass=_Related):
    """A tensor that knows of which weight it was made."""

    _virtual: VirtualWeight
    _is_hf_initialized = True  # as of a VirtualWeight
    _is_param = True  # to isinstance(w, nn.Parameter), which is what it stands for

    @classmethod
    def of(cls, weight: RPQWeight) -> Tensor:
        """Expands a weight; a graph that is being made takes the plain tensor.

        Args:
            weight: The codebooks.
        """
        virtual = VirtualWeight(weight)
        dense = virtual.expand_dense()
        if torch.compiler.is_compiling() or type(dense) is not Tensor:
            return with_notes(dense, weight)
        made = dense.as_subclass(cls)
        made.__dict__["_virtual"] = virtual
        return made

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the Parameter that this stands for."""
        if "_virtual" in self.__dict__:
            return self._virtual.noted(name)
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name) or "_virtual" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            self._virtual.note(name, value)


class ExpandedWeight(_Read):  # type: ignore[metaclass]
    """The tensor of a quantized weight, made when it was read.

    A tensor like any other, but that products with it run on the codebooks, that autograd does not keep it for
    backward, and that changing it in place is refused, since the change would be lost (but for multiplying it by a
    number, and for more or fewer rows through ``data``). What is computed of it is a plain tensor; views of it cannot
    be changed in place either.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else next(iter(kwargs.values()), None)
        if _is_one(first):
            if func in _SETTERS:
                return setattr(first._virtual, _SETTERS[func], args[1])
            if func is Tensor.requires_grad_:
                first._virtual.requires_grad_(*args[1:], **kwargs)
                return first
            if func == Tensor.data.__get__:  # type: ignore[attr-defined]
                return first
            if func in CHANGES:
                first._virtual.change(CHANGES[func], *args[1:])
                return first
            check_for_good(func, args)
        serve = SERVED.get(func)
        if serve is not None:
            result = serve(*[_virtual_of(arg) for arg in args], **{key: _virtual_of(x) for key, x in kwargs.items()})
            if result is not NotImplemented and not isinstance(result, (VirtualWeight, tuple)):
                return result
        if func in _TRANSPOSES and _is_one(first) and first.dim() == 2:
            return _turned(first, func, args, kwargs)
        check_values([_virtual_of(value) for value in (*args, *kwargs.values())])
        made: list[tuple[Tensor, VirtualWeight]] = []
        with torch._C.DisableTorchFunctionSubclass():
            plain = [_plain(arg, made) for arg in args]
            named = {key: _plain(value, made) for key, value in kwargs.items()}
        lasting = [(tensor, virtual) for tensor, virtual in made if virtual.part.lasting]
        again = [virtual.remade(tensor) for tensor, virtual in lasting] if torch.is_grad_enabled() else []
        with not_kept(again):
            return call(func, plain, named, [tensor for tensor, _ in made])


def _turned(weight: ExpandedWeight, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the transpose of a matrix, with which products run on the codebooks too."""
    with torch._C.DisableTorchFunctionSubclass():
        turned = func(*args, **kwargs).as_subclass(ExpandedWeight)
    virtual = getattr(weight._virtual, _TRANSPOSES[func])
    turned.__dict__["_virtual"] = virtual(*args[1:], **kwargs) if callable(virtual) else virtual
    return turned


class FixedWeight(_Read):  # type: ignore[metaclass]
    """The tensor of a quantized weight, for a reader that treats tensors with a torch function differently.

    To torch it is a plain tensor, which it keeps for backward; changes in place are answered as anywhere else.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def requires_grad_(self, requires_grad: bool = True) -> FixedWeight:
        """Freezes or frees the codebooks."""
        self._virtual.requires_grad_(requires_grad)
        return self


def _change(name: str) -> Callable[..., FixedWeight]:
    def change(self: FixedWeight, *args: Any, **kwargs: Any) -> FixedWeight:
        self._virtual.change(name, *args)
        return self

    return change


def _passed_on(name: str, read: Callable[[FixedWeight], Any]) -> property:
    return property(read, lambda self, value: setattr(self._virtual, name, value))


_VIEWS = (
    "__getitem__", "chunk", "contiguous", "detach", "flatten", "narrow", "permute", "reshape", "select", "split",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as",
)  # fmt: skip


def _viewed(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: call(getattr(Tensor, name), (self, *args), kwargs, (self,))


def _viewed_as(name: str) -> property:
    return property(lambda self: call(getattr(Tensor, name).__get__, (self,), {}, (self,)))


for _name in dir(Tensor):
    if changes(_name) and _name[:1].isalpha() and _name != "requires_grad_":
        setattr(FixedWeight, _name, _change(_name))
for _name in CHANGING_OPERATORS:
    setattr(FixedWeight, _name, _change(_name))
for _name in _VIEWS:
    setattr(FixedWeight, _name, _viewed(_name))
FixedWeight.T = _viewed_as("T")  # type: ignore[assignment]
FixedWeight.mT = _viewed_as("mT")  # type: ignore[assignment]
FixedWeight.data = _passed_on("data", lambda self: self)  # type: ignore[assignment]
FixedWeight.requires_grad = _passed_on("requires_grad", Tensor.requires_grad.__get__)  # type: ignore


def _plain(value: Any, made: list[tuple[Tensor, VirtualWeight]]) -> Any:
    """Returns a value with plain tensors for expanded weights; ``made`` takes these and what they were made of."""
    if _is_one(value):
        tensor = value.as_subclass(Tensor)
        made.append((tensor, value._virtual))
        return tensor
    if isinstance(value, (list, tuple)) and any(_is_one(item) for item in value):
        return type(value)([_plain(item, made) for item in value])
    return value


def _virtual_of(value: Any) -> Any:
    return value._virtual if _is_one(value) else value


def _is_one(value: Any) -> bool:
    return type(value) is ExpandedWeight and "_virtual" in value.__dict__
