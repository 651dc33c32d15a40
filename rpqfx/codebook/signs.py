"""Signs of uses of entries, one bit each, and what they make of a codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def pack_signs(minus: Tensor) -> Tensor:
    """Returns eight signs a byte.

    Args:
        minus: ``[..., N]`` bool, True for minus.

    Returns:
        ``[..., ceil(N/8)]`` uint8, the first sign in the lowest bit.
    """
    padded = F.pad(minus.to(torch.uint8), (0, -minus.shape[-1] % 8))
    return (rearrange(padded, "... (byte bit) -> ... byte bit", bit=8) * _bits(minus.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, num_vectors: int) -> Tensor:
    """Returns the inverse of ``pack_signs``.

    Args:
        signs: ``[..., ceil(N/8)]`` uint8.
        num_vectors: ``N``.

    Returns:
        ``[..., N]`` bool.
    """
    bits = signs[..., None] & _bits(signs.device)
    return rearrange(bits, "... byte bit -> ... (byte bit)")[..., :num_vectors].bool()


def _bits(device: torch.device) -> Tensor:
    """1, 2, 4 and so on to 128: the eight bits of a byte."""
    positions = torch.arange(
        8, dtype=torch.int32, device=device
    )  # ONNX has shifts of bytes with another dtype's result
    return torch.bitwise_left_shift(torch.ones_like(positions), positions).to(torch.uint8)


def fold_codebooks(codebooks: Tensor, signs: Tensor | None) -> Tensor:
    """Returns a signed codebook as a plain one that also lists each entry's negative: ``[R, G, 2K, d]``."""
    return codebooks if signs is None else torch.cat([codebooks, -codebooks], 2)


def unfold_codebooks(folded: Tensor, signs: Tensor | None) -> Tensor:
    """Returns the adjoint of ``fold_codebooks``."""
    if signs is None:
        return folded
    plus, minus = folded.chunk(2, 2)
    return plus - minus


def fold_codes(codes: Tensor, entries: int, signs: Tensor | None) -> Tensor:
    """Returns the codes that go with ``fold_codebooks``: a minus picks the negative, ``K`` entries further on."""
    return codes if signs is None else codes.int() + entries * unpack_signs(signs, codes.shape[-1])
