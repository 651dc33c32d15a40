"""Modules whose Parameters are quantized, under their own names.

Backing a Parameter ``weight`` of a module moves it into a child ``RPQWeight`` named ``weight_rpq`` and gives
the module a class on which ``weight`` is a property. Everything else of the module stays as it was: the object
itself, hooks, flags, attributes, methods. For the torch.nn layers that class is the RPQ layer (``Linear`` becomes
``RPQLinear``); for any other module it is a subclass made on the spot, on which reading the Parameter gives a
``VirtualWeight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from rpqfx.errors import RewriteError
from rpqfx.nn.hosting.backed import SUFFIX, Backed, backed_weights, held
from rpqfx.nn.hosting.reparametrised import refresh
from rpqfx.nn.weight import RPQWeight

READ_AS = "_rpqfx_read_as"
"""Attribute of a class made by a rewrite: the class whose forward shows what the module does."""


def _is_computed_from(base: type[nn.Module], name: str) -> bool:
    """Returns whether torch computes a weight from a Parameter: compilers know its functions for plain tensors."""
    layer = any(known.__module__.startswith("torch.nn.modules.") for known in base.__mro__ if known is not nn.Module)
    return issubclass(base, parametrize.ParametrizationList) or (layer and name.endswith(("_v", "_orig")))


_LAYERS: dict[type[nn.Module], type[Backed]] = {}


def register_layer(dense: type[nn.Module], layer: type[Backed]) -> None:
    """Makes ``layer`` what a module of exactly class ``dense`` becomes when it is backed."""
    _LAYERS[dense] = layer


def layer_for(dense: type[nn.Module]) -> type[Backed] | None:
    """Returns the RPQ layer that stands for exactly this class, if there is one."""
    return _LAYERS.get(dense)


def back(module: nn.Module, weights: Mapping[str, RPQWeight]) -> None:
    """Moves Parameters of a module into codebooks, in place.

    Args:
        module: Any module.
        weights: The codebooks by Parameter name.

    Raises:
        RewriteError: If the module has no such Parameter, or its class cannot be extended.
    """
    _become(module, backed_as(module, weights))
    for name, weight in weights.items():
        del module._parameters[name]
        module._modules[name + SUFFIX] = weight.train(module.training)
        if not isinstance(module, tuple(_LAYERS.values())):
            weight.__dict__.setdefault("read_as", "virtual")
    assert isinstance(module, Backed)
    module._adopt()


def backed_as(module: nn.Module, names: Iterable[str]) -> type[nn.Module]:
    """Returns the class that a module takes on when these Parameters of it are backed; the module stays as it is.

    Args:
        module: Any module.
        names: Names of Parameters of its own.

    Raises:
        RewriteError: If the module has no such Parameter, or its class cannot be extended.
    """
    for name in names:
        if module._parameters.get(name) is None:
            raise RewriteError(f"{type(module).__name__} has no Parameter {name!r} of its own to quantize")
        if _has(module, name + SUFFIX):
            raise RewriteError(f"{type(module).__name__} already has an attribute {name + SUFFIX!r}")
    before = type(module)
    if isinstance(module, tuple(_LAYERS.values())):
        return before
    try:
        target = _extended(before, {*backed_weights(module), *names}, parametrize.is_parametrized(module))
        _become(module, target)  # some classes only refuse when it comes to it
        _become(module, before)
    except Exception as error:  # extending a foreign class runs its own code
        raise RewriteError(f"{before.__name__} cannot take on quantized Parameters: {error}") from error
    return target


def obstacle_to(module: nn.Module, name: str) -> str | None:
    """Returns why a module cannot hold a Parameter of its own quantized, or None; the module stays as it is.

    Args:
        module: Any module.
        name: Name of the Parameter.
    """
    if _has(module, name + SUFFIX):
        return f"its module has an attribute {name + SUFFIX!r} of its own, where the codebooks would be"
    kind = type(module)
    plain = "__init_subclass__" not in {key for base in kind.__mro__[:-1] for key in vars(base)}
    if type(kind) is type and plain:
        return None
    try:
        backed_as(module, [name])
    except RewriteError as error:
        return str(error)
    return None


def _has(module: nn.Module, name: str) -> bool:
    """Returns whether a module or its class has an attribute, without a ``__getattr__`` that may answer for others."""
    held = (module.__dict__, module._parameters, module._buffers, module._modules)
    return any(name in group for group in held) or hasattr(type(module), name)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Sets a module's class, whatever its own ``__setattr__`` does."""
    object.__setattr__(module, "__class__", kind)


def _extended(before: type[nn.Module], held: set[str], parametrised: bool) -> type[nn.Module]:
    """Returns the class of a module whose class is ``before`` once it holds these Parameters in codebooks."""
    if parametrised and before.__module__ == parametrize.__name__:
        # Parametrising made a class for this one module, and undoing it looks at that class and its first base.
        body = {name: value for name, value in vars(before).items() if name not in ("__dict__", "__weakref__")}
        return type(before.__name__, (_extended(before.__bases__[0], held, False),), body)
    base = getattr(before, "_rpq_base", before)
    layer = layer_for(base)
    if layer is not None and all(isinstance(getattr(layer, name, None), property) for name in held):
        return layer
    return _backed_class(base, tuple(sorted(held)))  # a foreign class, or a Parameter added to a torch.nn layer


# What a class of torch.nn needs besides properties to work with held Parameters, by that class.
_ADAPTERS: dict[type[nn.Module], type[Backed]] = {}


def register_adapter(dense: type[nn.Module], adapter: type[Backed]) -> None:
    """Lays ``adapter`` over ``dense`` and its subclasses when they are backed.

    Args:
        dense: A class of torch.nn that cannot do with properties alone.
        adapter: The class before it in the order of bases.
    """
    _ADAPTERS[dense] = adapter


_FOREIGN: dict[tuple[type[nn.Module], tuple[str, ...]], type[Backed]] = {}


class _Foreign(Backed):
    """Base of the classes made on the spot; pickles as the class it extends and the names it holds."""

    _rpq_base: type[nn.Module]
    _rpq_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (_new, (named_class(self._rpq_base), self._rpq_names), *reduced[2:])

    @classmethod
    def _rpq_recipe(cls) -> tuple[Any, ...]:
        return _backed_class, named_class(cls._rpq_base), cls._rpq_names

    def _adopt(self) -> None:
        super()._adopt()
        if not any(weight.codebooks.is_meta for weight in backed_weights(self).values()):
            refresh(self)

    def __delattr__(self, name: str) -> None:
        """Refuses to drop what a hook computes from codebooks: torch then looks for the dense Parameter in vain."""
        held = [name + ending for ending in ("_v", "_orig") if name + ending + SUFFIX in self._modules]
        if held:
            raise RewriteError(
                f"{type(self).__name__}.{name} is computed from {held[0]}, which is quantized and cannot take "
                "its place as a dense Parameter; remove the weight norm, spectral norm or pruning before rewriting"
            )
        super().__delattr__(name)


def _backed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[Backed]:
    """Returns one class for each base and names, so that equal modules are of one class."""
    if (made := _FOREIGN.get((base, names))) is not None:
        return made
    body: dict[str, Any] = {name: held(name, _is_computed_from(base, name)) for name in names}
    body |= {"_rpq_base": base, "_rpq_names": names, "__module__": base.__module__, "__doc__": base.__doc__}
    if (under := getattr(base, READ_AS, None)) is not None:
        body[READ_AS] = _extended(under, set(names), False)
    adapter = next((_ADAPTERS[known] for known in base.__mro__ if known in _ADAPTERS), None)
    bases = (_Foreign, base) if adapter is None else (_Foreign, adapter, base)
    return _FOREIGN.setdefault((base, names), type(base.__name__, bases, body))  # of several threads', the first


def named_class(kind: type[nn.Module]) -> Any:
    """Returns the form of a class in a pickle: the class, or how it is made if it was made on the spot.

    Args:
        kind: A class of modules.
    """
    recipe = getattr(kind, "_rpq_recipe", None)
    return kind if recipe is None else recipe()


def class_of(named: Any) -> type[nn.Module]:
    """Returns the class that ``named_class`` named.

    Args:
        named: The form that it returned.
    """
    if isinstance(named, type):
        return named
    make, base, *arguments = named
    made: type[nn.Module] = make(class_of(base), *arguments)
    return made


def _new(base: Any, names: tuple[str, ...]) -> nn.Module:
    made = _backed_class(class_of(base), names)
    return made.__new__(made)
