"""The gradients of the products of ``rpqfx.codebook``, which has their algebra and the names of the axes."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.codebook import steps
from rpqfx.codebook.signs import fold_codes, unfold_codebooks, unpack_signs


def accumulate(
    x: Tensor,
    y: Tensor,
    codes: Tensor,
    books: int,
    entries: int,
    signs: Tensor | None = None,
    bins: steps.Bins = steps.bins,
) -> Tensor:
    """Returns the gradient of the codebooks in ``contract(x)`` when ``y`` is the gradient of its result.

    Args:
        x: ``[..., D]``.
        y: ``[..., N]``.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.
        bins: The function that sums into bins.

    Returns:
        ``[R, G, K, d]``, float32 where ``x`` is float16 or bfloat16, else of ``x``'s dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    total = _like_codebooks(flat, codes, books, entries)
    for part, filled in bins(y.reshape(-1, y.shape[-1]), codes, signs, books, entries):
        total = total + steps.bins_to_codebooks(filled, flat[part])
        del filled  # before the next block's are made
    return total


def contract_grads(
    x: Tensor,
    y: Tensor,
    codebooks: Tensor,
    codes: Tensor,
    signs: Tensor | None = None,
    bins: steps.Bins = steps.bins,
) -> tuple[Tensor, Tensor]:
    """Returns both gradients of ``contract(x)`` from one pass over the bins of ``y``, the gradient of its result.

    Args:
        x: ``[..., D]``.
        y: ``[..., N]``.
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``.
        signs: Packed signs or None.
        bins: The function that sums into bins.

    Returns:
        The gradient of ``x`` (``contract_t(y)``) and that of the codebooks (``accumulate(x, y)``).
    """
    _, books, entries, _ = codebooks.shape
    flat, wide = x.reshape(-1, x.shape[-1]), codebooks.to(steps.sum_dtype(codebooks.dtype))
    grad_x, total = torch.empty_like(flat), _like_codebooks(flat, codes, books, entries)
    for part, filled in bins(y.reshape(-1, y.shape[-1]), codes, signs, books, entries):
        grad_x[part] = steps.bins_to_rows(filled, wide)
        total = total + steps.bins_to_codebooks(filled, flat[part])
        del filled
    return grad_x.reshape(x.shape), total


def collect(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """Returns the adjoint of ``expand``: sums the gradient of every use of an entry.

    Args:
        grad: ``[N, D]``, the gradient of the rows that ``codes`` describe.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        ``[R, G, K, d]``, float32 where ``grad`` is float16 or bfloat16, else of its dtype.
    """
    folded = entries if signs is None else 2 * entries
    total = _like_codebooks(grad, codes, books, folded)
    parts = rearrange(grad.to(total.dtype), "n (m d) -> (n m) d", m=codes.shape[1])
    index = steps.entry_index(fold_codes(codes, entries, signs), total.shape)
    flat = rearrange(total, "r g k d -> (r g k) d")
    for stage in index:
        flat = flat.index_add(0, rearrange(stage, "m n -> (n m)"), parts)
    return unfold_codebooks(flat.view(total.shape), signs)


def collect_sparse(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """``collect`` as a sparse tensor that lists only the entries in use.

    Args:
        grad: ``[N, D]``.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        A sparse COO tensor ``[R, G, K, d]``: three sparse dimensions, one dense, not coalesced.
    """
    stages, sub_vectors, num_vectors = codes.shape
    parts = rearrange(grad, "n (m d) -> m n d", m=sub_vectors).expand(stages, -1, -1, -1)
    if signs is not None:
        parts = torch.where(unpack_signs(signs, num_vectors)[..., None], -parts, parts)
    shape = (stages, books, entries, parts.shape[-1])
    index = steps.entry_index(codes, shape).reshape(-1)
    index = torch.stack([index // (books * entries), index // entries % books, index % entries])
    return torch.sparse_coo_tensor(index, parts.reshape(-1, shape[3]), shape, check_invariants=False)


def _like_codebooks(x: Tensor, codes: Tensor, books: int, entries: int) -> Tensor:
    """Returns zeros ``[R, G, K, d]`` to sum a gradient of codebooks in."""
    shape = (codes.shape[0], books, entries, x.shape[-1] // codes.shape[1])
    return x.new_zeros(shape, dtype=steps.sum_dtype(x.dtype))
