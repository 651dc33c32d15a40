"""Finds the convention of the rotary embedding that a model's own code follows, by calling it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.kv.attention.rotary import RotaryConvention, apply_rotary
from rpqfx.nn.hosting.host import READ_AS

_CONVENTIONS = (
    RotaryConvention("halves", "halves"), RotaryConvention("interleaved", "interleaved"),
    RotaryConvention("halves", "interleaved"), RotaryConvention("single", "halves"),
    RotaryConvention("single", "interleaved"),
)  # fmt: skip
_DIM = 8


def rotary_convention_of(module: nn.Module) -> RotaryConvention | None:
    """Returns the convention by which an attention module rotates its keys.

    Functions of its own code whose name speaks of a rotary embedding are called with keys and angles that are known.

    Args:
        module: Takes cosines and sines with its call.

    Returns:
        The first convention that gives what one of the functions gives; None where there is none.
    """
    kind: Any = getattr(type(module), READ_AS, type(module))
    return _of_class(kind)


@functools.lru_cache(maxsize=256)
def _of_class(kind: Any) -> RotaryConvention | None:
    for function in _functions(kind):
        for convention in _CONVENTIONS:
            if _follows(function, convention):
                return convention
    return None


def _functions(kind: type[nn.Module]) -> Iterator[Callable[..., Any]]:
    forward = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    for name in () if code is None else code.co_names:
        found = forward.__globals__.get(name)
        if "rotary" in name and callable(found):
            yield found


@torch.no_grad()
def _follows(function: Callable[..., Any], convention: RotaryConvention) -> bool:
    """Returns whether a function rotates keys by angles that come in a convention, as this convention says."""
    angles = (torch.arange(3.0)[:, None] + 1) * torch.linspace(0.3, 1.1, _DIM // 2)
    if convention.angles != "single":
        angles = angles.repeat(1, 2) if convention.angles == "halves" else angles.repeat_interleave(2, -1)
    cos, sin = angles.cos()[None], angles.sin()[None]
    key = torch.linspace(-1, 2, 2 * 3 * _DIM).sin().view(1, 2, 3, _DIM)
    wanted = apply_rotary(convention.in_halves(key, _DIM), convention.read(cos, sin))
    for args in ((key, key, cos, sin), (key, cos, sin)):
        try:
            out = function(*args)
        except Exception:  # foreign code, called with what it may not be made for
            continue
        last = out[-1] if isinstance(out, tuple) else out
        if not isinstance(last, Tensor) or last.shape != key.shape:
            continue
        if torch.allclose(convention.in_halves(last, _DIM), wanted, atol=1e-5):
            return True
    return False
