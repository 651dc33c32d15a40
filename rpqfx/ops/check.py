"""Checks a backend's kernels against the plain functions, before their first use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpqfx import codebook
from rpqfx.codebook import feature_maps
from rpqfx.codebook.packing import pack_codes
from rpqfx.codebook.tiles import to_tiles
from rpqfx.errors import RPQError

# Rows of every path: a few, fewer than a table is wide, more, and several blocks with a rest.
ROWS = (1, 3, 7, 20, 70)
CODES = {torch.uint8: 40, torch.int16: 300, torch.uint16: 300}
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # and how far off a result may be
# Stages, codebooks, sub-vectors for each, their length, vectors: odd numbers of uses, several blocks, a tile's rest.
TILES = ((3, 1, 95, 8, 91), (5, 3, 2, 3, 64), (2, 1, 1, 16, 200))


def against_reference(backend: Any, device: torch.device) -> None:
    """Runs every kernel on small numbers.

    Args:
        backend: A module of kernels (see ``rpqfx.ops.backend``).
        device: Where they run.

    Raises:
        RPQError: If a result is not what the plain functions give in float64, within what its dtype rounds.
    """
    with torch.no_grad(), torch.device("cpu"), torch.autocast(device.type, enabled=False):  # wherever the first use is
        generator = torch.Generator().manual_seed(0)
        for dtype, tolerance in DTYPES.items():
            for code_dtype, entries in CODES.items():
                for with_signs in (False, True):
                    _check(backend, device, dtype, tolerance, code_dtype, entries, with_signs, generator)
        if hasattr(backend, "nearest"):
            _check_search(backend, device, generator)
        if hasattr(backend, "column_search"):
            _check_columns(backend, device, generator)
        if hasattr(backend, "residual_search"):
            _check_greedy(backend, device, generator)
        if hasattr(backend, "tiled"):
            for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 4e-2)):
                _check_tiled(backend, device, dtype, tolerance, generator)
        if hasattr(backend, "pick_sum"):
            for rows in (1, 7, 16):
                for entries, width in ((40, 8), (40, 6), (300, 9)):
                    _check_slots(backend, rows, entries, width, generator)


def _check(
    backend: Any, device: torch.device, dtype: torch.dtype, tolerance: float, code_dtype: torch.dtype, entries: int,
    with_signs: bool, g: torch.Generator,
) -> None:  # fmt: skip
    stages, books, share, d, vectors = 2, 3, 2, 20, 91
    sub_vectors = books * share
    codebooks = torch.randn(stages, books, entries, d, generator=g).to(dtype)
    codes = torch.randint(entries, (stages, sub_vectors, vectors), generator=g).to(code_dtype)
    minus = torch.randint(2, codes.shape, generator=g).bool()
    signs = codebook.pack_signs(minus) if with_signs else None
    scale = torch.randn(vectors, generator=g).to(dtype)
    ids = torch.randint(vectors, (5,), generator=g)
    weight = codebook.expand(codebooks.double(), codes, signs=signs)

    def run(name: str, *args: Any) -> Any:
        return getattr(backend, name)(*[arg.to(device) if isinstance(arg, Tensor) else arg for arg in args])

    def same(name: str, ours: Tensor, exact: Tensor) -> None:
        error = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
        if not error <= tolerance:
            raise RPQError(f"the kernel of {name} is wrong by {float(error):.1e} in {dtype}; plain operators are not")

    for rows in ROWS:
        x, y = (
            torch.randn(rows, d * sub_vectors, generator=g).to(dtype),
            torch.randn(rows, vectors, generator=g).to(dtype),
        )
        same("contract", run("contract", x, codebooks, codes, signs, scale), x.double() @ weight.t() + scale.double())
        same("contract_t", run("contract_t", y, codebooks, codes, signs), y.double() @ weight)
        grad_x, grad_books = run("contract_grads", x, y, codebooks, codes, signs)
        same("contract_t", grad_x, y.double() @ weight)
        exact = codebook.collect(y.double().t() @ x.double(), codes, books, entries, signs)
        same("accumulate", grad_books, exact)
    same("expand", run("expand", codebooks, codes, scale, signs), weight * scale.double()[:, None])
    same("lookup", run("lookup", ids, codebooks, codes, None, signs), weight[ids])
    grad = torch.randn(vectors, d * sub_vectors, generator=g).to(dtype)
    exact = codebook.collect(grad.double(), codes, books, entries, signs)
    same("collect", run("collect", grad, codes, books, entries, signs), exact)
    table = torch.randn(2, stages, sub_vectors, entries, 50, generator=g).to(dtype)
    same("gather_sum", run("gather_sum", table, codes), feature_maps.gather_sum(table.double(), codes))
    maps_of = torch.randn(2, vectors, 50, generator=g).to(dtype)
    same("bin_sum", run("bin_sum", maps_of, codes, entries), feature_maps.bin_sum(maps_of.double(), codes, entries))


def _check_tiled(backend: Any, device: torch.device, dtype: torch.dtype, tolerance: float, g: torch.Generator) -> None:
    """Checks products with codes in tiles, which some backends have."""
    for stages, books, share, d, vectors in TILES:
        codebooks = torch.randn(stages, books, 16, d, generator=g).to(dtype)
        codes = torch.randint(16, (stages, books * share, vectors), generator=g).to(torch.uint8)
        weight = codebook.expand(codebooks.double(), codes)
        for rows in ROWS:
            x = torch.randn(rows, weight.shape[1], generator=g).to(dtype)
            for plan in ("lookup", "dequantize"):
                held = x.to(device), codebooks.to(device), to_tiles(codes).to(device)
                ours = backend.tiled(*held, vectors, None, plan)
                exact = x.double() @ weight.t()
                error = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
                if not error <= tolerance:
                    raise RPQError(f"the kernel of tiles is wrong by {float(error):.1e} in {dtype}; others are not")


def _check_slots(backend: Any, rows: int, entries: int, width: int, g: torch.Generator) -> None:
    """Checks attention on codes, where a backend has it: heads of some slots and of none, tokens of several blocks."""
    batch, tokens, heads, which, groups, d, dim, half = 2, 139, [0, 3, 3, 5], [0, 2, 2, 1, 0], [1, 0, 2, 1, 1], 4, 10, 4
    head_of = torch.tensor([0, 0, 0, 2, 2])
    codes = torch.randint(entries, (batch, 5, tokens), generator=g)
    padded = torch.nn.functional.pad(codes, (0, -tokens % 8)).to(torch.int32)
    held = padded.byte() if width == 8 else pack_codes(padded, entries).view(batch, 5, -1)
    books, basis = torch.randn(3, entries, d, generator=g), torch.randn(3, 3 * d, dim, generator=g)
    mean, scale = torch.randn(3, dim, generator=g), torch.rand(batch, 3, tokens, generator=g).half()
    q, p = torch.randn(batch, 3, rows, dim, generator=g), torch.rand(batch, 3, rows, tokens, generator=g)
    parts, shift = torch.randn(batch, 5, rows, d, generator=g), torch.randn(batch, 3, rows, generator=g)
    cos, sin = torch.randn(1, tokens, half, generator=g), torch.randn(1, tokens, half, generator=g)

    def same(name: str, ours: Tensor, exact: Tensor) -> None:
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        if not error <= 1e-4:
            raise RPQError(f"the kernel of {name} is wrong by {float(error):.1e}; plain operators are not")

    used = torch.nn.functional.one_hot(codes, entries).double()  # [B, S, T, K]
    of_head = torch.nn.functional.one_hot(head_of, 3).double()
    tables = parts.double() @ books[which].double().transpose(1, 2)
    table = backend.slot_tables(parts, books, which)
    same("slot_tables", table[..., :rows], tables.transpose(2, 3))
    sums = torch.einsum("bstk,bsnk,sh->bhnt", used, tables, of_head) * scale[:, :, None].double()
    scores = torch.full((batch, 3, rows, tokens + 1), torch.nan)[..., 1:]
    backend.pick_sum(table, held, width, scale, shift, heads, scores)
    same("pick_sum", scores, sums + shift[..., None].double())
    masses = torch.einsum("bstk,bsnt->bskn", used, (p * scale[:, :, None])[:, head_of].double())
    same("bin_masses", backend.bin_masses(p, held, width, scale, heads, entries)[..., :rows], masses)
    bins = torch.nn.functional.pad(masses.float(), (0, table.shape[3] - rows))
    exact = masses.transpose(2, 3) @ books[which].double()
    same("slot_sums", backend.slot_sums(bins, rows, books, which), exact)
    places = torch.nn.functional.one_hot(torch.tensor(groups), 3).double()
    y = torch.einsum("bstk,ske,sg,sh->bhtge", used, books[which].double(), places, of_head).flatten(3)
    x = (y @ basis.double()) * scale[..., None].double() + mean[:, None].double()
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat(
        [left * cos[:, None] - right * sin[:, None], right * cos[:, None] + left * sin[:, None], rest], -1
    )
    layout = (which, groups, heads, held, width, tokens, scale)
    same("rotated_scores", backend.rotated_scores(q, books, *layout, basis, mean, cos, sin), q.double() @ turned.mT)


def _check_search(backend: Any, device: torch.device, g: torch.Generator) -> None:
    """Checks searches, which some backends have: entries are as near as any, and distances are right."""

    def same(name: str, points: Tensor, options: Tensor, found: Tensor, distances: Tensor) -> None:
        exact = (points[:, None].double() - options.double()).square().sum(-1)
        errors = torch.stack([(points.double() - found).square().sum(-1), distances.cpu().double()])
        error = (errors - exact.min(1).values).abs().max() / exact.max()
        if not error <= 1e-4:
            raise RPQError(f"the kernel of {name} is wrong by {float(error):.1e}; plain operators are not")

    for rows, entries, d in ((1, 1, 1), (70, 90, 1), (7, 40, 3), (3, 250, 20)):
        points, books = torch.randn(rows, d, generator=g) + 5, torch.randn(2, entries, d, generator=g) + 3
        codes, distances = backend.nearest(points.to(device), books[0].to(device))
        same("nearest", points, books[0], books[0][codes.cpu().long().clamp(0, entries - 1)], distances)
        codes, distances = backend.beam_search(points.to(device), books.to(device), entries)  # which tries all sums
        first, second = codes.cpu().long().clamp(0, entries - 1).t()
        every = (books[0][:, None] + books[1]).view(-1, d)
        same("beam_search", points, every, books[0][first] + books[1][second], distances)


def _check_columns(backend: Any, device: torch.device, g: torch.Generator) -> None:
    """Checks searches column by column: each sub-vector gets the nearest of all sums, given the ones before it."""
    for rows, count, entries, d in ((1, 1, 1, 1), (37, 3, 7, 4), (5, 2, 40, 3)):
        matrix, books = torch.randn(rows, count * d, generator=g), torch.randn(2, 2, entries, d, generator=g)
        turns, upper = torch.randn(count, d, d, generator=g), torch.randn(count * d, count * d, generator=g)
        groups, left = [c % 2 for c in range(count)], matrix.double()
        held = [tensor.to(device) for tensor in (matrix, books, turns, upper)]
        codes, seen = (x.cpu() for x in backend.column_search(*held[:2], groups, *held[2:], entries))
        for c, group in enumerate(groups):
            part = slice(c * d, c * d + d)
            own = books[:, group].double() @ turns[c].double()
            first, second = codes[:, c].clamp(0, entries - 1).t()
            point = left[:, part] @ turns[c].double()
            error = point - own[0][first] - own[1][second]
            least = torch.cdist(point, (own[0][:, None] + own[1]).view(-1, d)).min(1).values
            wrong = max(float((error.norm(dim=1) - least).max()), float((seen[:, part] - left[:, part]).abs().max()))
            if not wrong <= 1e-3 * (1 + float(left.abs().max())):
                raise RPQError(f"the kernel of column_search is wrong by {wrong:.1e}; plain operators are not")
            left[:, c * d + d :] -= error @ upper[part, c * d + d :].double()


def _check_greedy(backend: Any, device: torch.device, g: torch.Generator) -> None:
    """Checks greedy searches, which some backends have: each stage's entry is as good as any for what is left."""
    for cosine in (False, True):
        for rows, entries, d in ((1, 2, 1), (70, 90, 3), (7, 40, 40)):
            points, books = torch.randn(rows, d, generator=g) + 5, torch.randn(3, entries, d, generator=g) + 3
            codes, distances = backend.residual_search(points.to(device), books.to(device), cosine)
            rest, error = points.double(), 0.0
            for code, book in zip(codes.cpu().long().clamp(0, entries - 1).t(), books.double(), strict=True):
                left = (rest[:, None] - book).square().sum(-1)
                costs = -torch.cosine_similarity(rest[:, None], book, dim=-1) if cosine else left / left.max()
                error = max(error, float((costs.gather(1, code[:, None])[:, 0] - costs.min(1).values).max()))
                rest = rest - book[code]
            exact = rest.square().sum(-1)
            error = max(error, float((distances.cpu().double() - exact).abs().max() / exact.max()))
            if not error <= 1e-4:
                raise RPQError(f"the kernel of residual_search is wrong by {error:.1e}; plain operators are not")
