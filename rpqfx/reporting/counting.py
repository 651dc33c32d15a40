"""Bytes that tensors take in memory, and bits that they take in a saved file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from rpqfx.codebook.packing import stored_bits
from rpqfx.codebook.stored_codes import stored_bytes
from rpqfx.nn.weight import RPQWeight


class Counts(NamedTuple):
    """Sizes of the tensors of a weight, less those that were counted before.

    Args:
        floats: Bytes of codebooks and scales in memory.
        codes: Bytes of codes and signs in memory.
        shared: Bytes of codebooks and scales that were counted before.
        stored_code_bits: Bits of codes and signs in a saved file, which holds a seed in the place of codes that are
            drawn.
        stored_codebook_bits: Bits of codebooks in a saved file.
        stored_scale_bits: Bits of scales in a saved file.
        drawn_stages: Stages of codes for which a file holds the seed.
    """

    floats: int
    codes: int
    shared: int
    stored_code_bits: int
    stored_codebook_bits: int
    stored_scale_bits: int
    drawn_stages: int


def counted(weight: RPQWeight, seen: set[int]) -> Counts:
    """Counts the tensors of a weight.

    Args:
        weight: Its floating Parameters besides the codebooks count as scales.
        seen: ``id`` of the tensors that were counted before; those of this weight are added.
    """
    codebooks, codes, signs = weight.codebooks, weight.stored_codes, weight.signs
    scales = [p for p in weight.parameters(recurse=False) if p.is_floating_point() and p is not codebooks]
    floats, integers = [codebooks, *scales], [codes] if signs is None else [codes, signs]
    new = {id(tensor) for tensor in (*floats, *integers)} - seen
    others = ([] if signs is None else [signs]), [codebooks], scales
    stored_code_bits, stored_codebook_bits, stored_scale_bits = (
        sum(stored_bits(t) for t in part if id(t) in new) for part in others
    )
    drawn = len(weight.drawn_stages()) if id(codes) in new else 0
    if id(codes) in new:
        stored_code_bits += 8 * stored_bytes(weight.saved_spec.codes_shape, weight.spec.entries, drawn)
    new_floats, new_codes = unseen_bytes(floats, seen), unseen_bytes(integers, seen)
    shared = sum(tensor.nbytes for tensor in floats) - new_floats
    return Counts(new_floats, new_codes, shared, stored_code_bits, stored_codebook_bits, stored_scale_bits, drawn)


def unseen_bytes(tensors: Sequence[Tensor], seen: set[int]) -> int:
    """Returns the bytes of tensors in memory, each once; none of tensors that have no shape yet.

    Args:
        tensors: Tensors of any layout.
        seen: ``id`` of the tensors that were counted before; those given are added.
    """
    total = 0
    for tensor in tensors:
        if id(tensor) not in seen and not isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            seen.add(id(tensor))
            total += _nbytes(tensor)
    return total


def _nbytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's data; of a sparse one, of its indices and values."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    names = {
        torch.sparse_coo: ("_indices", "_values"),
        torch.sparse_csr: ("crow_indices", "col_indices", "values"),
        torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
        torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
        torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
    }.get(tensor.layout)
    if names is None:
        return tensor.numel() * tensor.element_size()
    return sum(getattr(tensor.detach(), name)().nbytes for name in names)
