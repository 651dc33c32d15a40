"""Modules whose attention goes through codes, though their forward stays as it was written."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rpqfx.errors import InputError, RewriteError
from rpqfx.graph.attention import AttentionSite
from rpqfx.kv.attention.rotary import Rotary
from rpqfx.kv.attention.rotary_conventions import rotary_convention_of
from rpqfx.kv.foreign_caches import check_cache
from rpqfx.kv.latents import expanded
from rpqfx.kv.module import KVAttention
from rpqfx.kv.products import Multiplying
from rpqfx.nn.attention import Attends
from rpqfx.nn.hosting.host import READ_AS, class_of, named_class
from rpqfx.nn.hosting.release import unbacked

OF_TRANSFORMERS = ("transformers", "latent")  # kinds of modules that ask transformers for an attention function
CORE = "kv_codes"  # the attribute under which a module holds its KVAttention


class _Through(TorchFunctionMode):
    """Redirects attention calls to a ``KVAttention``."""

    def __init__(self, core: KVAttention) -> None:
        super().__init__()
        self._core = core

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._core(*args, **kwargs)
        return func(*args, **kwargs)


class _Wrapped(nn.Module):
    """Base of the classes made here; pickles as the class it extends."""

    _kv_base: type[nn.Module]
    _kv_kind: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (_new, (named_class(self._kv_base), self._kv_kind), *reduced[2:])

    @classmethod
    def _rpq_recipe(cls) -> tuple[Any, ...]:
        return _class_of, named_class(cls._kv_base), cls._kv_kind


class _Calling(_Wrapped):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class this extends."""
        with _Through(getattr(self, CORE)):
            return super().forward(*args, **kwargs)


class _Attending(_Calling):
    """A ``torch.nn.MultiheadAttention``, quantized or not."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See ``torch.nn.MultiheadAttention``.

        Raises:
            InputError: If attention weights are asked for.
        """
        if args[1] if len(args) > 1 else kwargs.get("need_weights", True):
            raise InputError(
                f"{getattr(self, CORE).name}: attention weights are not made where keys are codes; "
                "call the module with need_weights=False, or skip it with a KVRule"
            )
        return super().forward(query, key, value, *args, **kwargs)


class _Rotating(_Wrapped):
    """A module of transformers that receives the rotary embedding's angles from its caller."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class this extends."""
        core = getattr(self, CORE)
        if core.trial is None and core.watch is None:
            check_cache(core.name, self, (*args, *kwargs.values()))
        with _angles(core, _found(core, args, kwargs)):
            return super().forward(*args, **kwargs)


class _Expanding(_Rotating):
    """A module of transformers that expands what a cache holds to keys and values."""

    def expand_kv(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """See the class this extends."""
        return expanded(getattr(self, CORE), super().expand_kv, latent, shared)  # type: ignore[misc]


class _Multiplying(_Wrapped):
    """A module that multiplies queries by keys, and weights by values, in its own code."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class this extends."""
        core = getattr(self, CORE)
        if core.trial is None and core.watch is None:
            check_cache(core.name, self, (*args, *kwargs.values()))
        call = Multiplying(core)
        try:
            with call:
                out = super().forward(*args, **kwargs)
        except TypeError:
            if call.refusal is None:
                raise
            raise call.refusal from None
        call.finish()
        return out


@contextmanager
def _angles(core: KVAttention, rotary: Rotary | None) -> Iterator[None]:
    underway, before = core.underway, core.underway.rotary
    underway.rotary = rotary
    try:
        yield
    finally:
        underway.rotary = before


def _found(core: KVAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rotary | None:
    """Returns cosines and sines, ``[B, T, R]`` each, of a call's arguments, where the model's convention is known."""
    if core.rotary_convention is None:
        return None
    for value in (kwargs.get("position_embeddings"), *args):
        pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, Tensor) for x in value)
        if pair and value[0].dim() == 3 and value[0].shape == value[1].shape and not value[0].is_complex():
            return core.rotary_convention.read(*value)
    return None


def wrap(site: AttentionSite, core: KVAttention) -> None:
    """Makes a module's attention go through codes, in place.

    Args:
        site: The attention module.
        core: What attends in its place; becomes its child ``kv_codes``.

    Raises:
        RewriteError: If its class cannot be extended, or it has such a child already.
    """
    module = site.module
    if CORE in module.__dict__ or CORE in module._modules or hasattr(type(module), CORE):
        raise RewriteError(f"{core.name} already has an attribute {CORE!r}; start from the model before quantize_kv")
    try:
        module.__class__ = _class_of(type(module), site.kind)
    except TypeError as error:
        raise RewriteError(f"{type(module).__name__} cannot be extended: {error}") from error
    module.add_module(CORE, core.train(module.training))
    if site.kind == "torch":  # torch's fused layers pass by the module, but not where it has hooks
        module.__dict__["_kv_hook"] = module.register_forward_pre_hook(_stay)
    core.latent = site.kind == "latent"
    if site.kind in OF_TRANSFORMERS:
        from rpqfx.kv.transformers import route  # transformers is there, since the module is

        module.__dict__["_kv_config"] = module.config
        module.config = route(module.config)
        core.rotary_convention = None if core.latent else rotary_convention_of(module)


def kind_of(module: nn.Module) -> str | None:
    """Returns the kind of the attention module that ``wrap`` made of this one; None where it did not.

    Args:
        module: Any module.
    """
    return getattr(type(module), "_kv_kind", None)


def bare(kind: str, core: KVAttention) -> nn.Module:
    """Returns a module of a kind that holds a core and nothing else; it says what is saved of it, and is not called.

    Args:
        kind: As ``kind_of`` returns it.
        core: The core.
    """
    made = _class_of(nn.Module, kind)()
    made.add_module(CORE, core)
    return made


def dense_kind(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the class of a module whose weights are dense again; attention on codes stays.

    Args:
        kind: A class of modules.

    Returns:
        The class; None where no dense one is known (see ``rpqfx.nn.hosting.release.unbacked``).
    """
    if "_kv_base" not in vars(kind):
        return unbacked(kind)
    base = unbacked(kind._kv_base)  # type: ignore[attr-defined]
    return None if base is None else _class_of(base, kind._kv_kind)  # type: ignore[attr-defined]


def unwrap(site: AttentionSite) -> None:
    """Undoes ``wrap``."""
    module = site.module
    module.__class__ = type(module)._kv_base  # type: ignore[attr-defined]
    del module._modules[CORE]
    if site.kind == "torch":
        module.__dict__.pop("_kv_hook").remove()
    if site.kind in OF_TRANSFORMERS:
        module.config = module.__dict__.pop("_kv_config")


def _stay(module: nn.Module, args: Any) -> None:
    """Does nothing."""


_BASES: dict[str, tuple[type, ...]] = {
    "call": (_Calling,),
    "torch": (_Attending,),
    "transformers": (_Rotating,),
    "latent": (_Expanding,),
    "products": (_Multiplying,),
}


_MADE: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _class_of(base: type[nn.Module], kind: str) -> type[nn.Module]:
    if (made := _MADE.get((base, kind))) is not None:
        return made
    if kind in OF_TRANSFORMERS:  # also where a model is unpickled that another process has wrapped
        importlib.import_module("rpqfx.kv.transformers")  # gives transformers the attention function
    bases = (*_BASES[kind], *((Attends,) if base is nn.MultiheadAttention else ()), base)
    made = type(base.__name__, bases, {"_kv_base": base, "_kv_kind": kind, READ_AS: base})
    return _MADE.setdefault((base, kind), made)  # of several threads', the first


def _new(base: Any, kind: str) -> nn.Module:
    made = _class_of(class_of(base), kind)
    return made.__new__(made)
