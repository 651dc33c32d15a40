"""Sums over slots: compiled kernels and torch's operators against the definition, at every width of codes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook.packing import code_bits
from rpqfx.errors import InputError
from rpqfx.kv.attention import slots as module
from rpqfx.kv.attention.slots import Slots, Stream, bin_masses, check, expand, packed, pick, sums, tables
from rpqfx.kv.attention.vectors import Held, rotate, rotated_scores
from rpqfx.ops.cpu import build, kernels
from tests.helpers import generator, randn, seeds

# float64 runs on torch's operators, float32 on the kernels where there are any. Of the largest element or of 1.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
runs = pytest.mark.parametrize(
    ("dtype", "threads"),
    [
        (torch.float64, 1),
        pytest.param(torch.float64, 3, marks=pytest.mark.slow),  # torch's own threads
        (torch.float32, 1),
        (torch.float32, 3),
    ],
    indirect=["threads"],
)
BATCH, D, GROUPS = 2, 3, 2


@pytest.fixture(scope="module", autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Slots, Stream, Tensor, int]:
    """Slots, their codes as they lie and as they are, and a seed; either side of the kernels' blocks of tokens."""
    counts, seed = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)), draw(seeds)
    entries = draw(st.sampled_from([2, 3, 5, 17, 40, 100, 256, 300, 3000, 40_000]))
    tokens, g = draw(st.sampled_from([0, 1, 7, 8, 9, 127, 128, 129, 300])), generator(seed)
    heads = tuple(sum(counts[:h]) for h in range(len(counts) + 1))
    codes = torch.randint(entries, (BATCH, heads[-1], tokens), generator=g)
    books, groups = (tuple(torch.randint(2, (heads[-1],), generator=g).tolist()) for _ in range(2))
    if entries <= 256 and draw(st.booleans()):
        stream = Stream(torch.nn.functional.pad(codes.byte(), (0, 5)), 8, entries, tokens)  # room for more
    else:
        data = torch.nn.functional.pad(packed(codes, entries), (0, draw(st.sampled_from([0, 5]))))
        stream = Stream(data, code_bits(entries), entries, tokens)
    return Slots(books, groups, heads), stream, codes, seed


rows = st.sampled_from([1, 3, 4, 5, 8, 9, 16, 20])


def close(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    largest = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=TOLERANCE[ours.dtype] * largest)


@given(cases())
def test_codes_come_back_from_their_width(case: tuple[Slots, Stream, Tensor, int]) -> None:
    _, stream, codes, _ = case
    assert torch.equal(stream.block(0, stream.length).long(), codes)
    if stream.length > 8:
        assert torch.equal(stream.block(8, stream.length - 1).long(), codes[..., 8:-1])


@runs
@given(cases(), rows, st.booleans())
def test_picks_and_bins(dtype: torch.dtype, case: tuple[Slots, Stream, Tensor, int], n: int, scaled: bool) -> None:
    slots, stream, codes, seed = case
    heads, tokens = len(slots.heads) - 1, stream.length
    books, parts = (
        randn(seed, 2, stream.entries, D, dtype=dtype),
        randn(seed, BATCH, slots.heads[-1], n, D, dtype=dtype),
    )
    scale = torch.rand(BATCH, heads, tokens + 2, generator=generator(seed)).half()[..., :tokens] if scaled else None
    shift = randn(seed + 1, BATCH, heads, n, dtype=dtype) if scaled else None
    p = randn(seed + 2, BATCH, heads, n, tokens + 3, dtype=dtype)[..., 3:]
    table = tables(parts, books, slots.books)
    exact = parts.double() @ books.double()[list(slots.books)].transpose(1, 2)
    close(table, exact.transpose(2, 3))
    y = torch.zeros(BATCH, heads, n, tokens, dtype=torch.float64)
    bins = torch.zeros(BATCH, slots.heads[-1], n, stream.entries, dtype=torch.float64)
    factor = torch.ones(BATCH, heads, 1, tokens).double() if scale is None else scale[:, :, None].double()
    for h in range(heads):
        for s in range(slots.heads[h], slots.heads[h + 1]):
            index = codes[:, s, None].expand(-1, n, -1)
            y[:, h] += exact[:, s].gather(2, index) * factor[:, h]
            bins[:, s].scatter_add_(2, index, p[:, h].double() * factor[:, h])
    close(pick(table, stream, slots.heads, scale, shift), y if shift is None else y + shift[..., None].double())
    close(pick(table.clone(), stream, slots.heads, scale), y)
    ours = bin_masses(p, stream, slots.heads, scale)
    close(ours, bins.transpose(2, 3))
    for some in (ours, ours.clone()):
        close(sums(some, books, slots.books), ours.double().transpose(2, 3) @ books.double()[list(slots.books)])


@runs
@given(cases(), rows, st.booleans(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_turned_vectors(
    dtype: torch.dtype, case: tuple[Slots, Stream, Tensor, int], n: int, full: bool, angles: torch.dtype
) -> None:
    """With and without a basis of another width, angles of each sample or of all, in any dtype."""
    slots, stream, codes, seed = case
    heads, tokens = len(slots.heads) - 1, stream.length
    books, length = randn(seed, 2, stream.entries, D, dtype=dtype), GROUPS * D
    y = torch.zeros(BATCH, heads, tokens, length, dtype=dtype)
    for h in range(heads):
        for s in range(slots.heads[h], slots.heads[h + 1]):
            group = slots.groups[s]
            y[:, h, :, group * D : (group + 1) * D] += books[slots.books[s]][codes[:, s]]
    dim = 70 if full else length
    basis, mean = (
        (randn(seed, heads, length, dim, dtype=dtype), randn(seed, heads, dim, dtype=dtype)) if full else (None,) * 2
    )
    scale = torch.rand(BATCH, heads, tokens, generator=generator(seed)).half() if full else None
    if tokens > 8:
        close(expand(books, slots, stream, 8, tokens, length), y[:, :, 8:])
    x = y if basis is None else y @ basis
    x = x if scale is None else x * scale[..., None].to(dtype)
    x = x if mean is None else x + mean[:, None]
    cos, sin = (randn(seed + i, BATCH if full else 1, tokens + 4, dim // 2 - 1).to(angles)[:, 4:] for i in (1, 2))
    q = randn(seed + 3, BATCH, heads, n, dim, dtype=dtype)
    ours = rotated_scores(q, Held(books, slots, stream, scale, basis, mean, dim), cos, sin)
    close(ours, q.double() @ rotate(x.double(), cos, sin).transpose(-1, -2))


@pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
def test_codes_past_the_entries_are_refused() -> None:
    """Kernels read where codes point."""
    table, p = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 1, 8)
    for width, data in ((8, torch.full((1, 1, 8), 5)), (3, torch.full((1, 1, 3), 255))):
        stream = Stream(data.byte(), width, 5, 8)
        with pytest.raises(IndexError, match="5 entries"):
            pick(table, stream, (0, 1))
        with pytest.raises(IndexError, match="5 entries"):
            bin_masses(p, stream, (0, 1))


@pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
def test_what_does_not_go_together_is_refused() -> None:
    codes = torch.zeros(1, 2, 8, dtype=torch.uint8)
    table = torch.zeros(1, 2, 4, 4)
    for rows_, width, tokens, heads in ((3, 8, 9, [0, 2]), (5, 8, 8, [0, 2]), (3, 17, 8, [0, 2]), (3, 8, 8, [0, 1])):
        with pytest.raises(ValueError):
            kernels.pick_sum(table, codes, width, None, None, heads, torch.zeros(1, 1, rows_, tokens))


@given(cases(), seeds)
@settings(max_examples=30)
def test_blocks_change_nothing(case: tuple[Slots, Stream, Tensor, int], seed: int) -> None:
    slots, stream, _, _ = case
    table = randn(seed, BATCH, slots.heads[-1], stream.entries, 2)
    p = randn(seed, BATCH, len(slots.heads) - 1, 2, stream.length)
    whole = pick(table, stream, slots.heads), bin_masses(p, stream, slots.heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ELEMENTS", 64)
        close(pick(table, stream, slots.heads), whole[0])
        close(bin_masses(p, stream, slots.heads), whole[1])


@pytest.mark.parametrize(
    ("slots", "length", "message"),
    [
        (Slots((0, 1), (0, 0), (0, 1)), 6, "2 slots do not go"),
        (Slots((0,), (0, 1), (0, 1)), 6, "slots do not go"),
        (Slots((0, 1), (0, 0), (0, 3, 2)), 6, "slots do not go"),
        (Slots((0, 2), (0, 0), (0, 2)), 6, "a codebook or a sub-vector"),
        (Slots((0, 1), (0, 2), (0, 2)), 6, "a codebook or a sub-vector"),
        (Slots((0, 1), (0, 1), (0, 2)), 7, "vectors of 7 are not cut into sub-vectors of 3"),
    ],
)
def test_slots_that_cannot_be_are_refused(slots: Slots, length: int, message: str) -> None:
    with pytest.raises(InputError, match=f"layer 3: .*{message}|layer 3: {message}"):
        check(slots, torch.zeros(2, 4, 3), length, "layer 3")
