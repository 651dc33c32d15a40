"""Modules that are kept out of tracing by name."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from rpqfx.errors import InputError

_MARK = "_rpqfx_leaf"

M = TypeVar("M")


def leaf(module: M) -> M:
    """Keeps a module, or every module of a class, out of tracing.

    Its forward is then never run by [`capture`][rpqfx.graph.module_graphs.capture], nor followed by
    [`whole_graph`][rpqfx.graph.whole_graph]: use it where tracing a forward is slow or has effects outside of the
    module. Its weights are found all the same, those of torch.nn layers by their class and its own Parameters of two or
    more axes as kind ``"parameter"``; its children are read as usual. To keep a weight out of rewriting, write a
    [`Rule`][rpqfx.policies.policy.Rule] with ``skip``.

    The mark is an attribute of the module itself, so it goes where the module goes: copies and pickles have it, and
    nothing outlives the module. A class hands it on to its subclasses.

    Example:
        >>> @leaf
        ... class Sampler(nn.Module):
        ...     def forward(self, x): ...

    Args:
        module: A module, or a class of modules (then also as a decorator).

    Returns:
        ``module``.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(module, nn.Module):
        module.__dict__[_MARK] = True
    elif isinstance(module, type) and issubclass(module, nn.Module):
        setattr(module, _MARK, True)
    else:
        raise InputError(f"leaf takes a module or a class of modules, got {module!r}")
    return module


def own(kind: type[M]) -> type[M]:
    """Marks a class of modules that other rewrites of this library put into models.

    Their Parameters are none that a policy decides on, and their forward is not read.

    Args:
        kind: A class of modules.

    Returns:
        ``kind``.
    """
    kind._rpqfx_own = True  # type: ignore[attr-defined]
    return kind


def is_own(module: nn.Module) -> bool:
    """Returns whether a module is of a class that ``own`` marked."""
    return bool(getattr(type(module), "_rpqfx_own", False))


def is_leaf(module: nn.Module) -> bool:
    """Returns whether a module or its class was given to ``leaf``."""
    found: Any = module.__dict__.get(_MARK)  # not by getattr: a wrapper may answer for what it wraps
    return bool(found or getattr(type(module), _MARK, False))
