"""The operations through torch's own operators: on every device and dtype, and what all others are checked against.

Torch looks whether an index lies in the table that it is given. That is all codebooks in a row, where a code that is
too large picks an entry of the next codebook; so on a CPU the codes are looked at before. On a GPU that would make the
CPU wait.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rpqfx import codebook
from rpqfx.codebook import feature_maps
from rpqfx.errors import CodeError

__all__ = [
    "accumulate",
    "bin_sum",
    "collect",
    "contract",
    "contract_grads",
    "contract_t",
    "expand",
    "gather_sum",
    "lookup",
]


def contract(
    x: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Returns ``rpqfx.codebook.contract``, with a bias ``[N]`` added."""
    check_codes(codes, codebooks.shape[2])
    y = codebook.contract(x, codebooks, codes, signs=signs)
    return y if bias is None else y + bias


def contract_t(y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.contract_t``."""
    check_codes(codes, codebooks.shape[2])
    return codebook.contract_t(y, codebooks, codes, signs=signs)


def accumulate(x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.accumulate``."""
    check_codes(codes, entries)
    return codebook.accumulate(x, y, codes, books, entries, signs)


def contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``rpqfx.codebook.contract_grads``."""
    check_codes(codes, codebooks.shape[2])
    return codebook.contract_grads(x, y, codebooks, codes, signs)


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.expand``."""
    check_codes(codes, codebooks.shape[2])
    return codebook.expand(codebooks, codes, scale, signs)


def lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """See ``rpqfx.codebook.lookup``."""
    check_codes(codes, codebooks.shape[2])
    return codebook.lookup(ids, codebooks, codes, scale, signs)


def collect(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """See ``rpqfx.codebook.collect``."""
    check_codes(codes, entries)
    return codebook.collect(grad, codes, books, entries, signs)


def gather_sum(table: Tensor, codes: Tensor) -> Tensor:
    """See ``rpqfx.codebook.feature_maps.gather_sum``."""
    check_codes(codes, table.shape[3])
    return feature_maps.gather_sum(table, codes)


def bin_sum(y: Tensor, codes: Tensor, entries: int, runs: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """See ``rpqfx.codebook.feature_maps.bin_sum``."""
    check_codes(codes, entries)
    return feature_maps.bin_sum(y, codes, entries, runs)


def check_codes(codes: Tensor, entries: int) -> None:
    """Raises where codes point outside their codebook. What is traced, or not on a CPU, is not looked at.

    Args:
        codes: ``[R, M, N]``.
        entries: ``K``.

    Raises:
        CodeError: If a code is below zero, or not below ``entries``.
    """
    if type(codes) is not Tensor or not codes.is_cpu or not codes.numel() or _traced():
        return
    low, high = (codes.int() if codes.dtype is torch.uint16 else codes).aminmax()  # torch has no minimum of uint16
    if int(low) < 0 or int(high) >= entries:
        raise CodeError(f"codes hold {int(low)} to {int(high)}, but there are {entries} entries; they are damaged")


def _traced() -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._get_tracing_state() is not None or _get_current_dispatch_mode() is not None
