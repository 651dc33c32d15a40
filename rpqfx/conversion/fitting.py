"""One weight, or the codebooks of several, fitted to what its inputs show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rpqfx.codebook import CodebookSpec, pack_signs
from rpqfx.fit.error_feedback import Search, encode
from rpqfx.fit.k_means import kmeans
from rpqfx.fit.residual import improve, train
from rpqfx.fit.scales import balance, refit_columns, refit_rows
from rpqfx.ops.column_search import column_search

# Sub-vectors an entry that codebooks are trained on, and how many are enough whatever the entries.
_SAMPLES_PER_ENTRY = 128
_SAMPLES = 2**20
_FEWEST_PER_ENTRY = 8
_STAGED_SAMPLES = 2**15  # at least, of codebooks with more than two stages
_STEPS = 20
_BEAM = 32


class Fitted(NamedTuple):
    """A weight in codes.

    Args:
        codes: ``[R, M, N]``.
        factors: ``scale [N]`` and ``column_scale [D / share]``, where the spec has them.
        signs: Packed, ``[R, M, ceil(N/8)]``, where the spec has them.
        error: Relative error of the weight, ``|W - W'| / |W|``.
    """

    codes: Tensor
    factors: dict[str, Tensor]
    signs: Tensor | None
    error: float


class Scaled(NamedTuple):
    """A matrix whose rows and columns are divided by factors.

    Args:
        matrix: ``[N, D]``.
        rows: ``[N]`` or None.
        columns: ``[D / share]`` or None.
    """

    matrix: Tensor
    rows: Tensor | None
    columns: Tensor | None


@torch.no_grad()
def scaled(vectors: Tensor, spec: CodebookSpec, energy: Tensor | None) -> Scaled:
    """A matrix as codebooks are to see it.

    Args:
        vectors: ``[N, D]``.
        spec: Which factors it has.
        energy: Mean squared inputs ``[D]``, or None.
    """
    matrix = vectors if vectors.dtype == torch.float64 else vectors.float()
    rows = columns = None
    if spec.scale:
        rows = matrix.square().mean(1).sqrt()
        rows = stored(torch.where(rows > 0, rows, torch.ones_like(rows)), vectors.dtype)
        matrix = matrix / rows[:, None]
    if spec.column_scale_group:
        columns = stored(balance(matrix, energy, share=spec.column_scale_group), vectors.dtype)
        matrix = matrix / columns.repeat_interleave(spec.column_scale_group)
    return Scaled(matrix, rows, columns)


@torch.no_grad()
def train_codebooks(members: Sequence[tuple[Tensor, CodebookSpec, Tensor | None]], *, seed: int = 0) -> Tensor:
    """Codebooks for one weight or, where they are shared, for several.

    Args:
        members: Vectors ``[N, D]``, spec and mean squared inputs of each weight.
        seed: Of the draws.

    Returns:
        ``[R, G, K, d]``, in the dtype of the first member's vectors; float32 ones rounded to half precision.
    """
    first, spec, _ = members[0]
    dtype = first.dtype
    stages, books, entries, d = spec.codebooks_shape
    total = sum(vectors.numel() for vectors, _, _ in members) // d // books
    wanted = entries * max(_FEWEST_PER_ENTRY, min(_SAMPLES_PER_ENTRY, _SAMPLES // entries))
    wanted = max(wanted, _STAGED_SAMPLES) if stages > 2 else wanted
    share = min(1.0, wanted / total)
    generator = torch.Generator(first.device).manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(books)]
    for vectors, own, energy in members:
        matrix = scaled(vectors, own, energy).matrix
        groups = matrix.view(len(matrix), books, -1, d).transpose(0, 1).reshape(books, -1, d)
        count = max(1, round(groups.shape[1] * share))
        for part, points in zip(parts, groups, strict=True):
            drawn = torch.randperm(len(points), generator=generator, device=points.device)[:count]
            part.append(points[drawn])
    train_one = _train_signed if spec.signs else _train
    trained = [train_one(torch.cat(part), stages, entries, seed + number) for number, part in enumerate(parts)]
    return stored(torch.stack(trained, 1), dtype).to(dtype)


def _train(points: Tensor, stages: int, entries: int, seed: int) -> Tensor:
    if stages > 1:
        books = train(points, stages, entries, seed=seed)[0]
        return books if stages == 2 else improve(points, books, beam=_BEAM)
    return kmeans(points, entries, steps=_STEPS, seed=seed)[0][None]


def _train_signed(points: Tensor, stages: int, entries: int, seed: int) -> Tensor:
    """Codebooks of points whose every use of an entry may be turned: stage after stage, of one half of space."""
    books = []
    for stage in range(stages):
        points = torch.where(points.sum(1, keepdim=True) < 0, -points, points)
        book, codes = kmeans(points, entries, steps=_STEPS, seed=seed + stage)
        books.append(book)
        points = points - book[codes]
    return torch.stack(books)


@torch.no_grad()
def fit_weight(
    vectors: Tensor,
    spec: CodebookSpec,
    codebooks: Tensor,
    moment: Tensor | None,
    energy: Tensor | None = None,
    outputs: Tensor | None = None,
    search: Search = column_search,
) -> Fitted:
    """Finds codes and factors of a weight for given codebooks.

    Args:
        vectors: The weight, ``[N, D]``.
        spec: Its shape in codebooks.
        codebooks: ``[R, G, K, d]``.
        moment: Mean second moment of its inputs ``[D, D]``, or None.
        energy: Mean squared inputs ``[D]``, where the moment is not known.
        outputs: Mean second moment of the gradients of its outputs ``[N, N]``, or None where they are not known. Used
            with ``moment`` only.
        search: Finds the codes of rows, as ``encode`` takes it.

    Returns:
        What is stored, but for the codebooks.
    """
    view = scaled(vectors, spec, moment.diagonal() if moment is not None else energy)
    columns = view.columns
    if moment is not None and columns is not None:
        wide = columns.repeat_interleave(spec.column_scale_group).to(moment.dtype)
        moment = moment * wide * wide[:, None]
    if moment is None:
        outputs = None
    elif outputs is not None and view.rows is not None:
        outputs = outputs * view.rows.to(outputs.dtype) * view.rows.to(outputs.dtype)[:, None]
    minus = None
    if spec.signs:  # an entry or its negative, whichever is nearer: a codebook of both
        both = encode(view.matrix, torch.cat([codebooks, -codebooks], 2), moment, outputs, beam=_BEAM, search=search)
        minus = both.codes >= spec.entries
        coded = both._replace(codes=both.codes % spec.entries)
    else:
        coded = encode(view.matrix, codebooks, moment, outputs, beam=_BEAM, search=search)
    rows, decoded = view.rows, coded.decoded
    if moment is not None:
        seen = moment.to(decoded.dtype)
        felt = None if outputs is None else outputs.to(decoded.dtype)
        if columns is not None:
            moved = refit_columns(view.matrix, decoded, seen, spec.column_scale_group, outputs=felt)
            better = stored(columns * moved, vectors.dtype)
            decoded = decoded * (better / columns).repeat_interleave(spec.column_scale_group)
            columns = better
        if rows is not None:
            rows = stored(rows * refit_rows(view.matrix, decoded, seen, outputs=felt), vectors.dtype)
    made = coded.decoded
    made = made if columns is None else made * columns.repeat_interleave(spec.column_scale_group)
    made = made if rows is None else made * rows[:, None]
    norm = vectors.float().norm()
    error = float((vectors.float() - made).norm() / norm) if norm > 0 else 0.0
    factors = {"scale": rows, "column_scale": columns}
    kept = {name: factor.to(vectors.dtype) for name, factor in factors.items() if factor is not None}
    return Fitted(coded.codes, kept, None if minus is None else pack_signs(minus), error)


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns numbers as they will be stored: in 16 bits, where the model's dtype is wider.

    In half precision, where none of them becomes infinite or zero; in bfloat16 otherwise, which reaches as far as
    float32.

    Args:
        tensor: Any numbers.
        dtype: The model's.
    """
    if dtype.itemsize <= 2:
        return tensor.to(dtype).to(tensor.dtype)
    for narrow in (torch.float16, torch.bfloat16):
        small = tensor.to(narrow).to(tensor.dtype)
        if bool(torch.isfinite(small).all()) and bool(((small != 0) == (tensor != 0)).all()):
            return small
    return tensor
