r"""The heart of rpqfx: a matrix that is never stored, and the four ways to use it.

A weight is seen as ``N`` vectors of length ``D`` (the rows of a Linear, the entries of an Embedding, the filters
of a convolution). Each vector is cut into ``M`` sub-vectors of length ``d``, and each sub-vector is an entry of a
small codebook, or a sum of one entry per residual stage:

    W[n, m*d:(m+1)*d] = scale[n] * sum_r sign[r,m,n] * codebooks[r, g(m), codes[r,m,n], :]

Axes, in this order wherever they meet:

    R  residual stages           M  sub-vectors per vector (M * d = D)     N  vectors
    G  codebooks per stage       K  entries per codebook                   d  length of a sub-vector
    S  sub-vectors per codebook  (G * S = M, so g(m) = m // S: own codebooks G = M, one for the layer G = 1)

The stored tensors are ``codebooks [R, G, K, d]`` (floating), ``codes [R, M, N]`` (the narrowest integer), and two
optional ones, ``scale [N]`` and ``signs [R, M, ceil(N/8)]`` (one bit each, a set bit means minus).

With the matrix product written as the form ``sum_bn y[b,n] * x[b,:] . W[n,:]``, which is linear in ``x``, in ``y``
and in the codebooks, its three partial derivatives are the three products of training: ``contract`` (the
layer), ``contract_t`` (the gradient of its input) and ``accumulate`` (the gradient of its codebooks). None
makes ``W``. This is asymmetric distance computation (Jegou, Douze, Schmid, "Product Quantization for Nearest
Neighbor Search", 2011, section III) used as a layer.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from rpqfx import steps
from rpqfx.errors import InputError
from rpqfx.signs import fold_codebooks, fold_codes, pack_signs, unfold_codebooks, unpack_signs
from rpqfx.spec import CodebookSpec, GradScale, code_dtype, nearest_divisor

__all__ = [
    "CodebookSpec",
    "GradScale",
    "accumulate",
    "code_dtype",
    "collect",
    "collect_sparse",
    "contract",
    "contract_grads",
    "contract_t",
    "expand",
    "lookup",
    "nearest_divisor",
    "pack_signs",
    "select_vectors",
    "unpack_signs",
]


# ---------------------------------------------------------------------------------------- the four functions


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """The matrix itself.

    Args:
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``, integer.
        scale: ``[N]`` or None.
        signs: ``[R, M, ceil(N/8)]`` uint8, packed by ``pack_signs``, or None.

    Returns:
        ``W [N, D]``, of the codebooks' dtype.

    Raises:
        InputError: If the codebooks are complex.
    """
    folded = fold_codebooks(_real(codebooks), signs)
    index = steps.entry_index(fold_codes(codes, codebooks.shape[2], signs), folded.shape)
    flat = rearrange(folded, "r g k d -> (r g k) d")
    per_stage = [flat.index_select(0, rearrange(stage, "m n -> (n m)")) for stage in index]
    rows = rearrange(sum(per_stage[1:], per_stage[0]), "(n m) d -> n (m d)", m=codes.shape[1])
    return rows if scale is None else rows * scale[:, None]


def lookup(
    ids: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """Some rows of the matrix, ``W[ids]``, at the cost of those rows alone.

    Args:
        ids: Integer tensor of any shape, values 0 to N - 1.
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        ``[*ids.shape, D]``.

    Raises:
        InputError: If the codebooks are complex.
    """
    some = select_vectors(ids.reshape(-1), codes, scale, signs)
    rows = expand(codebooks, *some)
    return rows.reshape(*ids.shape, rows.shape[-1])


def contract(
    x: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """``x @ W.T`` without ``W``: dot each sub-vector of ``x`` with every entry, then gather and sum.

    Args:
        x: ``[..., D]``.
        codebooks: ``[R, G, K, d]``, of ``x``'s dtype.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        ``[..., N]``. For ``B`` rows it costs ``B*K*D*R`` multiply-adds and ``B*M*N*R`` additions, against
        ``B*N*D`` for a dense product. float16 and bfloat16 are summed in float32.

    Raises:
        InputError: If ``x`` or the codebooks are complex.
    """
    rows = _real(x).reshape(-1, x.shape[-1])
    folded = fold_codebooks(_real(codebooks), signs)
    codes = fold_codes(codes, codebooks.shape[2], signs)
    # First whether one graph serves every batch: to ask how many rows there are would bind the graph to the answer.
    if not torch.compiler.is_compiling() and rows.shape[0] <= steps.GATHER_ROWS:
        y = steps.gather_few(steps.table(rows, folded), codes, folded).to(x.dtype)
    else:
        index = steps.table_index(codes, folded)
        y = x.new_empty(rows.shape[0], codes.shape[-1])
        for part in steps.blocks(rows.shape[0], codes, folded.shape[2]):
            y[part] = steps.gather_sum(steps.table(rows[part], folded), index)
    y = y.reshape(*x.shape[:-1], codes.shape[-1])
    return y if scale is None else y * scale


def contract_t(
    y: Tensor, codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> Tensor:
    """``y @ W`` without ``W``: sum ``y`` into one bin per entry, then one small product.

    Args:
        y: ``[..., N]``.
        codebooks: ``[R, G, K, d]``, of ``y``'s dtype.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        ``[..., D]``, at the cost of ``contract``, whose adjoint this is.

    Raises:
        InputError: If ``y`` or the codebooks are complex.
    """
    rows = _real(y if scale is None else y * scale).reshape(-1, y.shape[-1])
    folded = fold_codebooks(_real(codebooks), signs).to(steps.sum_dtype(codebooks.dtype))
    x = y.new_empty(rows.shape[0], codes.shape[1] * codebooks.shape[3])
    for part, bins in steps.bins(rows, fold_codes(codes, codebooks.shape[2], signs), *folded.shape[1:3]):
        x[part] = _bins_to_rows(bins, folded)
    return x.reshape(*y.shape[:-1], x.shape[-1])


def select_vectors(
    index: Tensor | slice, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The codes, scale and signs of some vectors.

    Args:
        index: One-dimensional integer tensor (none below zero), or a slice.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        The same three, of the vectors that ``index`` names.
    """

    def pick(x: Tensor) -> Tensor:
        if isinstance(index, slice):
            return x[..., index]
        if x.dtype is torch.uint16:  # torch's selection does not know it; int16 holds the same bits
            return x.view(torch.int16).index_select(-1, index).view(torch.uint16)
        return x.index_select(-1, index)

    some = None if signs is None else pack_signs(pick(unpack_signs(signs, codes.shape[-1])))
    return pick(codes), None if scale is None else pick(scale), some


# ------------------------------------------------------------------------------------------- their gradients


def accumulate(x: Tensor, y: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """The gradient of the codebooks in ``contract(x)`` when ``y`` is the gradient of its result.

    Args:
        x: ``[..., D]``.
        y: ``[..., N]``.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        ``[R, G, K, d]``, of ``x``'s dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    total = _like_codebooks(flat, codes, books, entries, signs)
    for part, bins in steps.bins(y.reshape(-1, y.shape[-1]), fold_codes(codes, entries, signs), *total.shape[1:3]):
        total = total + _bins_to_codebooks(bins, flat[part])
    return unfold_codebooks(total, signs).to(x.dtype)


def contract_grads(
    x: Tensor, y: Tensor, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both gradients of ``contract(x)`` from one pass over the bins of ``y``, the gradient of its result.

    Args:
        x: ``[..., D]``.
        y: ``[..., N]``.
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``.
        signs: Packed signs or None.

    Returns:
        The gradient of ``x`` (``contract_t(y)``) and that of the codebooks (``accumulate(x, y)``).
    """
    _, books, entries, _ = codebooks.shape
    flat = x.reshape(-1, x.shape[-1])
    folded = fold_codebooks(codebooks, signs).to(steps.sum_dtype(codebooks.dtype))
    grad_x, total = torch.empty_like(flat), _like_codebooks(flat, codes, books, entries, signs)
    for part, bins in steps.bins(y.reshape(-1, y.shape[-1]), fold_codes(codes, entries, signs), *total.shape[1:3]):
        grad_x[part] = _bins_to_rows(bins, folded)
        total = total + _bins_to_codebooks(bins, flat[part])
    return grad_x.reshape(x.shape), unfold_codebooks(total, signs).to(x.dtype)


def collect(grad: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None = None) -> Tensor:
    """The adjoint of ``expand``: sums the gradient of every use of an entry.

    Args:
        grad: ``[N, D]``, the gradient of the rows that ``codes`` describe.
        codes: ``[R, M, N]``.
        books: ``G``.
        entries: ``K``.
        signs: Packed signs or None.

    Returns:
        ``[R, G, K, d]``, of ``grad``'s dtype.
    """
    total = _like_codebooks(grad, codes, books, entries, signs)
    parts = rearrange(grad.to(total.dtype), "n (m d) -> (n m) d", m=codes.shape[1])
    index = steps.entry_index(fold_codes(codes, entries, signs), total.shape)
    flat = rearrange(total, "r g k d -> (r g k) d")
    for stage in index:
        flat = flat.index_add(0, rearrange(stage, "m n -> (n m)"), parts)
    return unfold_codebooks(flat.view(total.shape), signs).to(grad.dtype)


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


def _like_codebooks(x: Tensor, codes: Tensor, books: int, entries: int, signs: Tensor | None) -> Tensor:
    """Zeros to sum a gradient of codebooks in: ``[R, G, K, d]``, or ``2K`` entries where there are signs."""
    folded = entries if signs is None else 2 * entries
    shape = (codes.shape[0], books, folded, x.shape[-1] // codes.shape[1])
    return x.new_zeros(shape, dtype=steps.sum_dtype(x.dtype))


def _bins_to_rows(bins: Tensor, codebooks: Tensor) -> Tensor:
    """``[b, D]``: the entries, weighted by their bins ``[r, g, s, k, b]``."""
    return rearrange(torch.einsum("rgskb,rgkd->bgsd", bins, codebooks), "b g s d -> b (g s d)")


def _bins_to_codebooks(bins: Tensor, x: Tensor) -> Tensor:
    """``[R, G, K, d]``: the sub-vectors of ``x [b, D]``, weighted by the bins."""
    parts = rearrange(x.to(bins.dtype), "b (g s d) -> b g s d", g=bins.shape[1], s=bins.shape[2])
    return torch.einsum("rgskb,bgsd->rgkd", bins, parts)


def _real(x: Tensor) -> Tensor:
    if x.is_complex():
        raise InputError(f"codebooks hold real numbers, got {x.dtype}; rewrite the real and imaginary parts apart")
    return x
