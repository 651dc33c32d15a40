"""Changes in place that codebooks can follow exactly: a tensor times a number, and more or fewer rows.

Code that resizes a table (a vocabulary, as a rule) makes a dense tensor with the old rows and new ones, and assigns it.
Old rows keep their codes to the bit; new rows get the nearest that the codebooks already hold.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange
from torch import Tensor

from rpqfx.codebook import CodebookSpec, pack_signs, unpack_signs
from rpqfx.codebook.signs import fold_codebooks
from rpqfx.errors import RewriteError
from rpqfx.nn.weight import RPQWeight
from rpqfx.ops.search import nearest


@torch.no_grad()
def multiply(held: RPQWeight, factor: float) -> None:
    """Multiplies a quantized tensor by a number, in place.

    Args:
        held: The tensor.
        factor: The number.

    Raises:
        RewriteError: If it has no factors of its own, and its codebooks are those of other weights too.
    """
    factors = held.column_scale if held.scale is None else held.scale
    if factors is None and held.shares_codebooks:
        raise RewriteError(
            "this weight shares its codebooks with others, which would be multiplied too; "
            "give it a scale (Rule(..., scale=True)) or codebooks of its own"
        )
    (held.codebooks if factors is None else factors).mul_(factor)


@torch.no_grad()
def resize_rows(held: RPQWeight, tensor: Tensor) -> None:
    """Gives a quantized tensor more or fewer rows (indices of its first axis), in place.

    The codebooks stay, so whatever shares them is not changed; where the tensor is tied, all its names are resized at
    once. New rows are encoded greedily, stage upon stage, by the nearest entries; a scale is then the one of least
    squares. On the meta device only shapes change.

    Args:
        held: The tensor.
        tensor: The new tensor, ``[rows, ...]``: up to the smaller of both numbers of rows, those that it has now.

    Raises:
        RewriteError: If a row that stays would change, which codebooks cannot promise to hold, or its vectors do not
            lie along rows. Nothing is changed then.
    """
    shape, rows = held.layout.shape, held.layout.to_vectors
    if tuple(tensor.shape[1:]) != shape[1:] or not len(tensor) or tensor.dtype != held.codebooks.dtype:
        raise RewriteError(
            f"a quantized weight of shape {shape} and {held.codebooks.dtype} can get more or fewer "
            f"rows, and nothing else; got {tuple(tensor.shape)} and {tensor.dtype}"
        )
    obstacle = None if len(tensor) == shape[0] else row_obstacle(held)
    if obstacle is not None:
        raise RewriteError(obstacle)
    layout = dataclasses.replace(held.layout, shape=tuple(tensor.shape))
    if layout.zero_vector is not None and layout.zero_vector >= layout.num_vectors:
        layout = dataclasses.replace(layout, zero_vector=None)
    kept = min(held.spec.num_vectors, layout.num_vectors)
    vectors = layout.to_vectors(tensor.detach())
    if not tensor.is_meta and not torch.equal(rows(held())[:kept], vectors[:kept]):
        raise RewriteError(
            "this would change the values of a quantized weight, whose codebooks hold only what they learned; "
            "train its codebooks, keep the change apart (as an adapter), or leave this layer dense with a Rule"
        )
    _set_vectors(held, kept, vectors[kept:])
    held.spec = dataclasses.replace(held.spec, num_vectors=layout.num_vectors)
    held.layout = layout


def row_obstacle(held: RPQWeight) -> str | None:
    """Returns why a quantized tensor cannot get more or fewer rows, or None.

    Args:
        held: The tensor.
    """
    if held.layout.vector_axes[0] == 0:
        return None
    return (
        "the vectors of this weight do not lie along its rows, so that more or fewer of them need other codebooks; "
        'rewrite the model with a Rule that says split="row" for it'
    )


def _set_vectors(held: RPQWeight, kept: int, added: Tensor) -> None:
    """Keeps the first ``kept`` vectors as they are, and appends those of ``added [n, D]``."""
    codes, scale, minus = _encode(held, added)
    before = held.spec.num_vectors
    held.codes = _join(held.codes[..., :kept], codes)
    if held.signs is not None:
        held.signs = pack_signs(torch.cat([unpack_signs(held.signs, before)[..., :kept], minus], -1))
    if held.scale is not None:
        held.scale.data = torch.cat([held.scale[:kept], scale])


def _encode(held: RPQWeight, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes ``[R, M, n]``, scale ``[n]`` and minus signs ``[R, M, n]`` of the nearest vectors there are."""
    spec, codebooks = held.spec, held.codebooks.detach()
    shape = (spec.stages, spec.num_subvectors, len(vectors))
    if codebooks.is_meta or not len(vectors):
        return held.codes.new_empty(shape), vectors.new_empty(len(vectors)), held.codes.new_empty(shape).bool()
    books = codebooks if codebooks.dtype == torch.float64 else codebooks.float()
    dims = held.tensors.dims
    if dims is not None:  # each sub-vector has entries of its own then
        share = spec.num_subvectors // books.shape[1]
        books = books.repeat_interleave(share, 1) * dims.to(books.dtype).view(-1, 1, spec.codebook_dim)
    work = vectors.to(books.dtype)
    scale = work.square().mean(1).sqrt() / books.square().mean((1, 2, 3)).sum().sqrt() if spec.scale else None
    if scale is not None:  # a guess that picks the codes
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes, found = _nearest_codes(work if scale is None else work / scale[:, None], books, spec, held.signs)
    if scale is not None:
        length = found.square().sum(1)
        scale = torch.where(length > 0, (work * found).sum(1) / length, torch.ones_like(length))
    minus = codes >= spec.entries
    codes = torch.where(minus, codes - spec.entries, codes).to(spec.code_dtype)
    return codes, (work.new_ones(len(vectors)) if scale is None else scale).to(vectors.dtype), minus


def _nearest_codes(vectors: Tensor, books: Tensor, spec: CodebookSpec, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns folded codes ``[R, M, n]`` (``K`` more where the sign is minus), and their vectors ``[n, D]``."""
    rest = rearrange(vectors, "n (m d) -> m n d", d=spec.codebook_dim)
    found, codes = torch.zeros_like(rest), []
    share = spec.num_subvectors // books.shape[1]
    for stage in fold_codebooks(books, signs):
        chosen = [nearest(part, stage[m // share])[0] for m, part in enumerate(rest - found)]
        found = found + torch.stack([stage[m // share][code] for m, code in enumerate(chosen)])
        codes.append(torch.stack(chosen))
    return torch.stack(codes), rearrange(found, "m n d -> n (m d)")


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Returns two sets of codes along their last axis."""
    if first.dtype is torch.uint16:  # torch does not join it everywhere; int16 holds the same bits
        return torch.cat([first.contiguous().view(torch.int16), second.view(torch.int16)], -1).view(torch.uint16)
    return torch.cat([first, second], -1)
