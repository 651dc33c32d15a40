r"""The heart of rpqfx: a matrix that is never stored, and the four ways to use it.

A weight is seen as ``N`` vectors of length ``D`` (the rows of a Linear, the entries of an Embedding, the filters
of a convolution). Each vector is cut into ``M`` sub-vectors of length ``d``, and each sub-vector is an entry of a
small codebook, or a sum of one entry per residual stage:

    W[n, m*d:(m+1)*d] = scale[n] * sum_r sign[r,m,n] * codebooks[r, g(m), codes[r,m,n], :]

Axes, always in this order:

    R  residual stages           M  sub-vectors per vector (M * d = D)     N  vectors
    G  codebooks per stage       K  entries per codebook                   d  length of a sub-vector
    S  sub-vectors per codebook  (G * S = M, so g(m) = m // S: own codebooks G = M, one for the layer G = 1)

The stored tensors are ``codebooks [R, G, K, d]`` (floating), ``codes [R, M, N]`` (the narrowest integer), and two
optional ones, ``scale [N]`` and ``signs [R, M, ceil(N/8)]`` (one bit each, a set bit means minus). A weight may have
a factor for each of its columns too, ``W[n, j] * column_scale[j // share]``, which ``rpqfx.ops.products`` applies: to
the input of a product or to its result, so that nothing here has to know of it.

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

from rpqfx.codebook import steps
from rpqfx.codebook.signs import fold_codebooks, fold_codes, pack_signs, unpack_signs
from rpqfx.errors import InputError

__all__ = ["contract", "contract_t", "expand", "lookup", "range_of", "select_sub_vectors", "select_vectors"]


# ---------------------------------------------------------------------------------------- the four functions


def expand(codebooks: Tensor, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    """Returns the matrix itself.

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
    """Returns some rows of the matrix, ``W[ids]``, at the cost of those rows alone.

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
    y: Tensor,
    codebooks: Tensor,
    codes: Tensor,
    scale: Tensor | None = None,
    signs: Tensor | None = None,
    bins: steps.Bins = steps.bins,
) -> Tensor:
    """``y @ W`` without ``W``: sum ``y`` into one bin per entry, then one small product.

    Args:
        y: ``[..., N]``.
        codebooks: ``[R, G, K, d]``, of ``y``'s dtype.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.
        bins: The function that sums into bins.

    Returns:
        ``[..., D]``, at the cost of ``contract``, whose adjoint this is.

    Raises:
        InputError: If ``y`` or the codebooks are complex.
    """
    rows = _real(y if scale is None else y * scale).reshape(-1, y.shape[-1])
    entries = _real(codebooks).to(steps.sum_dtype(codebooks.dtype))
    x = y.new_empty(rows.shape[0], codes.shape[1] * codebooks.shape[3])
    for part, filled in bins(rows, codes, signs, *codebooks.shape[1:3]):
        x[part] = steps.bins_to_rows(filled, entries)
        del filled  # before the next block's are made
    return x.reshape(*y.shape[:-1], x.shape[-1])


def select_vectors(
    index: Tensor | slice, codes: Tensor, scale: Tensor | None = None, signs: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the codes, scale and signs of some vectors.

    Args:
        index: One-dimensional integer tensor (none below zero), or a slice.
        codes: ``[R, M, N]``.
        scale: ``[N]`` or None.
        signs: Packed signs or None.

    Returns:
        The same three, of the vectors that ``index`` names.
    """
    some = None
    if signs is not None and isinstance(index, slice) and index.step in (None, 1) and not (index.start or 0) % 8:
        start, stop, _ = range_of(index, codes.shape[-1])  # whole bytes
        some = signs[..., start // 8 : -(-max(start, stop) // 8)]
    elif signs is not None:
        some = pack_signs(_pick(unpack_signs(signs, codes.shape[-1]), index, -1))
    return _pick(codes, index, -1), None if scale is None else _pick(scale, index, -1), some


def select_sub_vectors(
    index: Tensor | slice, codebooks: Tensor, codes: Tensor, signs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the codebooks, codes and signs of some sub-vectors, of every vector.

    Args:
        index: One-dimensional integer tensor (none below zero), or a slice. Where several sub-vectors share a codebook
            but not all do, it names all or none of those that share one.
        codebooks: ``[R, G, K, d]``.
        codes: ``[R, M, N]``.
        signs: Packed signs or None.

    Returns:
        The same three, of the sub-vectors that ``index`` names. Codebooks that all sub-vectors share stay whole.
    """
    books, share = codebooks, codes.shape[1] // codebooks.shape[1]
    if codebooks.shape[1] > 1 and isinstance(index, slice):
        start, stop, _ = range_of(index, codes.shape[1])
        books = codebooks[:, start // share : stop // share]
    elif codebooks.shape[1] > 1:
        books = codebooks.index_select(1, index[::share] // share)  # type: ignore[index]
    return books, _pick(codes, index, 1), None if signs is None else _pick(signs, index, 1)


def range_of(index: slice, size: int) -> tuple[int, int, int]:
    """``index.indices(size)`` for steps above zero; compilers of older torch cannot trace that.

    Args:
        index: A slice.
        size: Number of elements along the axis that is indexed.

    Returns:
        Start, stop (not below start) and step.
    """
    start, stop = (0 if index.start is None else index.start), (size if index.stop is None else index.stop)
    start = max(0, start + size) if start < 0 else min(start, size)
    stop = max(0, stop + size) if stop < 0 else min(stop, size)
    return start, max(start, stop), 1 if index.step is None else index.step


def _pick(x: Tensor, index: Tensor | slice, axis: int) -> Tensor:
    if isinstance(index, slice):
        return x[..., index] if axis == -1 else x[:, index]
    if x.dtype is torch.uint16:  # torch's selection does not know it; int16 holds the same bits
        return x.view(torch.int16).index_select(axis, index).view(torch.uint16)
    return x.index_select(axis, index)


def _real(x: Tensor) -> Tensor:
    if x.is_complex():
        raise InputError(f"codebooks hold real numbers, got {x.dtype}; rewrite the real and imaginary parts apart")
    return x
