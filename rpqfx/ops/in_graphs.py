"""Products and rows as operators of the compiled CPU kernels, for graphs that call them with no Python in between.

Each function is that of ``rpqfx.ops.library`` with its name, or returns None where kernels do not take the tensors;
graphs call an operator that Python runs then. Each is one step: a compiler that saw a part of it alone would keep that
for the backward pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rpqfx.ops.cpu import build, kernels


def contract(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Returns ``x @ W.T + bias``, through tables."""
    if not _usable(x, codes):
        return None
    return kernels.contract(x, codebooks.to(x.dtype), codes, signs, _like(x, bias))


def matmul(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Returns ``x @ W.T + bias``, through the dequantized matrix."""
    if not _usable(x, codes):
        return None
    return kernels.matmul(x, codebooks.to(x.dtype), codes, signs, _like(x, bias))


def conv(x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None, *geometry: Any) -> Tensor | None:
    """Runs a convolution with dequantized filters."""
    if not _usable(x, codes):
        return None
    return kernels.conv(x, codebooks.to(x.dtype), codes, signs, None, None, None, *geometry)


def tiled(
    x: Tensor, codebooks: Tensor, tiles: Tensor, signs: Tensor | None, bias: Tensor | None, vectors: int, plan: str
) -> Tensor | None:
    """Returns ``x @ W.T + bias``, of codes in tiles."""
    if not _usable(x, tiles):
        return None
    return kernels.tiled(x, codebooks.to(x.dtype), tiles, vectors, _like(x, bias), plan)


def expand(
    codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None, dims: Tensor | None = None
) -> Tensor | None:
    """Returns the matrix."""
    if not _usable(codebooks, codes):
        return None
    return kernels.expand(codebooks, codes, scale, signs, dims)


def lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None, signs: Tensor | None,
    dims: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Returns rows of the matrix."""
    if not _usable(codebooks, codes):
        return None
    return kernels.lookup(ids.long(), codebooks, codes, scale, signs, dims)


def _usable(x: Tensor, codes: Tensor) -> bool:
    return x.device.type == "cpu" and kernels.take(x.dtype, codes.dtype) and _ready()


def _ready() -> bool:
    return build.ready()


# What torch.compiler.assume_constant_result sets; to call it would import the compiler.
_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _like(x: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
