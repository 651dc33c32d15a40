"""Whatever the kernels are given, they return or they raise: nothing is read or written outside of it.

A read outside of a tensor that goes unnoticed is not found here; what is checked before anything is read, is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import CodeError
from rpqfx.ops import reference
from rpqfx.ops.backend import choose
from rpqfx.ops.cpu import build, kernels
from tests.helpers import generator, randn, seeds, stored

needs_kernels = pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
SPEC = CodebookSpec(21, 12, 4, entries=5, stages=2, num_codebooks=3, signs=True, scale=True)
F32 = torch.float32


def operators(seed: int, dtype: torch.dtype) -> dict[str, list[Any]]:
    """Arguments of every operator that go together."""
    books, codes, scale, signs = stored(SPEC, seed, dtype)
    x, y = randn(seed, 3, SPEC.dim, dtype=dtype), randn(seed, 3, SPEC.num_vectors, dtype=dtype)
    g, wide = generator(seed), torch.float32
    tiles = torch.randint(256, (1, 3, 64), generator=g, dtype=torch.uint8)
    held = torch.randint(256, (2, 4, 24), generator=g, dtype=torch.uint8) % 5
    slot_books, heads, which = randn(seed, 2, 5, 4, dtype=wide), [0, 1, 4], [0, 1, 1, 0]
    factors = torch.rand(2, 2, 19, generator=g).half()
    q, angles = randn(seed, 2, 2, 3, 8, dtype=wide), randn(seed, 1, 19, 4, dtype=wide)
    return {
        "contract": [x, books, codes, signs, scale],
        "contract_t": [y, books, codes, signs],
        "grads": [x, y, books, codes, signs, 3, 5, 4],
        "matmul": [x, books, codes, signs, scale],
        "conv": [
            randn(seed, 2, 4, 9, dtype=dtype), books, codes, signs, x[0, :4].clone(), scale, y[0].clone(), [21, 4, 3],
            [1], [1], [1], False, [0], 1,
        ],
        "tiled": [x, books[:, :1].clone(), tiles, 21, x[0].clone(), scale, y[0].clone(), -1],
        "expand": [books, codes, scale, signs, torch.tensor([0, 20, 7]), x[0].clone()],
        "collect": [randn(seed, SPEC.num_vectors, SPEC.dim, dtype=dtype), codes, signs, 3, 5],
        "gather_sum": [randn(seed, 2, 2, 3, 5, 7, dtype=dtype), codes, signs],
        "bin_sum": [randn(seed, 2, SPEC.num_vectors, 7, dtype=dtype), codes, signs, 5],
        "nearest": [randn(seed, 9, 3, dtype=wide), randn(seed + 1, 7, 3, dtype=wide)],
        "beam_search": [randn(seed, 9, 3, dtype=wide), randn(seed + 1, 2, 7, 3, dtype=wide), 3],
        "slot_tables": [randn(seed, 2, 4, 3, 4, dtype=wide), slot_books, which],
        "slot_sums": [randn(seed, 2, 4, 5, 4, dtype=wide), 3, slot_books, which],
        "pick_sum": [
            randn(seed, 2, 4, 5, 4, dtype=wide), held, 8, factors, randn(seed, 2, 2, 3, dtype=wide), heads,
            torch.zeros(2, 2, 3, 19),
        ],
        "bin_masses": [randn(seed, 2, 2, 3, 19, dtype=wide), held, 8, factors, heads, 5],
        "rotated_scores": [
            q, slot_books, which, [0, 0, 1, 1], heads, held, 8, 19, factors, randn(seed, 2, 8, 8, dtype=wide),
            randn(seed, 2, 8, dtype=wide), angles, angles.flip(1),
        ],
    }  # fmt: skip


NAMES = sorted(operators(0, torch.float32))


def _resized(x: Tensor, axis: int, size: int) -> Tensor:
    index = torch.arange(size) % max(1, x.shape[axis])
    return x.index_select(axis, index) if x.shape[axis] and x.dtype is not torch.uint16 else x


def _spoiled(x: Tensor) -> Tensor:
    """NaN, infinity, and integers that point outside."""
    x = x.clone()
    bad = [float("nan"), float("inf"), -float("inf")] if x.is_floating_point() else [250, 255, 6]
    for i, value in enumerate(bad[: x.numel()]):
        x.view(-1)[i * max(1, x.numel() // 4)] = value
    return x


TENSORS: dict[str, Callable[[Tensor, int], Any]] = {
    "meta": lambda x, i: x.to("meta"),
    "none": lambda x, i: None,
    "sparse": lambda x, i: x.to_sparse() if x.is_floating_point() else x,
    "double": lambda x, i: x.double(),
    "half": lambda x, i: x.half(),
    "bytes": lambda x, i: x.to(torch.uint8),
    "short": lambda x, i: x.to(torch.int16),
    "int": lambda x, i: x.to(torch.int32) - 3,
    "long": lambda x, i: x.to(torch.int64) * 2**40,
    "spoiled": lambda x, i: _spoiled(x),
    "empty": lambda x, i: _resized(x, i % x.dim(), 0),
    "short one": lambda x, i: _resized(x, i % x.dim(), max(0, x.shape[i % x.dim()] - 1)),
    "long one": lambda x, i: _resized(x, i % x.dim(), x.shape[i % x.dim()] + 1),
    "flat": lambda x, i: x.reshape(-1),
    "deeper": lambda x, i: x[None],
    "number": lambda x, i: x.reshape(-1)[0] if x.numel() else x,
    "turned": lambda x, i: x.transpose(0, i % x.dim()),
    "expanded": lambda x, i: x.select(i % x.dim(), 0).unsqueeze(i % x.dim()).expand(x.shape) if x.numel() else x,
}
INTEGERS = [-1, 0, 1, 2, 7, 17, 2**31, 2**62]


@needs_kernels
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), seeds, st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_kernels_return_or_raise(name: str, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    args = operators(seed, dtype)[name]
    for place in data.draw(st.lists(st.integers(0, len(args) - 1), min_size=1, max_size=3, unique=True)):
        arg = args[place]
        if isinstance(arg, Tensor) and arg.dim():
            change = TENSORS[data.draw(st.sampled_from(sorted(TENSORS)))]
            args[place] = change(arg, data.draw(st.integers(0, 4)))
        elif isinstance(arg, int):
            args[place] = data.draw(st.sampled_from(INTEGERS))
        elif isinstance(arg, list):
            args[place] = data.draw(st.lists(st.sampled_from([-1, 0, 1, 2, 4, 2**62]), max_size=6))
    try:
        result = getattr(torch.ops.rpqfx_cpu, name)(*args)
    except (ValueError, TypeError, IndexError, RuntimeError, MemoryError):
        return
    for tensor in result if isinstance(result, tuple) else (result,):
        if tensor is not None and not tensor.is_floating_point():  # codes that were found
            assert not tensor.numel() or (tensor.min() >= 0 and tensor.max() < 7)


def _apart(x: Any, step: int) -> Any:
    """The same values, which do not lie beside each other."""
    if not isinstance(x, Tensor) or not x.dim():
        return x
    wide = x.new_empty([size * step + 1 for size in x.shape])
    view = wide[tuple(slice(1, None, step) for _ in x.shape)]
    return view.copy_(x)


@needs_kernels
@given(st.sampled_from(["contract", "contract_t", "expand", "nearest", "beam_search", "slot_tables"]), seeds)
def test_tensors_may_lie_in_any_order(name: str, seed: int) -> None:
    args = operators(seed, torch.float32)[name]
    run = getattr(torch.ops.rpqfx_cpu, name)
    exact = run(*args)
    turned = [
        arg.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(arg, Tensor) and arg.dim() > 1 else arg
        for arg in args
    ]
    for other in ([_apart(arg, 2) for arg in args], turned):
        found = run(*other)
        for a, b in zip(*[x if isinstance(x, tuple) else (x,) for x in (exact, found)], strict=True):
            assert torch.equal(a, b)


@needs_kernels
def test_eight_threads_at_once_find_what_one_does() -> None:
    """To the last bit: no kernel has memory of its own between calls."""
    given = operators(0, F32)
    pairs = {name: given[name] for name in NAMES if name != "pick_sum"}  # which writes into what it is given

    def run() -> list[Any]:
        return [getattr(torch.ops.rpqfx_cpu, name)(*args) for name, args in pairs.items()]

    alone, found = run(), [[] for _ in range(8)]  # type: ignore[var-annotated]
    threads = [threading.Thread(target=lambda i=i: found[i].extend(run() for _ in range(10))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found:
        assert len(results) == 10
        for result in results:
            for ours, exact in zip(result, alone, strict=True):
                pair = zip(ours, exact, strict=True) if isinstance(exact, tuple) else [(ours, exact)]
                assert all(torch.equal(a, b) for a, b in pair)


@pytest.mark.parametrize("backend", [reference, pytest.param(kernels, marks=needs_kernels)], ids=["plain", "compiled"])
@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("wrong", [5, 14, -1, 2**15 - 1])
def test_codes_outside_their_codebook_are_refused(backend: Any, code_dtype: torch.dtype, wrong: int) -> None:
    """Also those that are another codebook's entries where codebooks lie in a row."""
    if wrong < torch.iinfo(code_dtype).min or wrong > torch.iinfo(code_dtype).max:
        wrong = 255
    books, codes, scale, signs = stored(SPEC, 0, F32)
    damaged = codes.to(torch.int32)
    damaged[0, 1, 3] = wrong
    damaged = damaged.to(code_dtype)
    x, y = randn(0, 3, SPEC.dim, dtype=F32), randn(0, 3, SPEC.num_vectors, dtype=F32)
    many = randn(0, 40, SPEC.dim, dtype=F32)
    calls: list[Callable[[Tensor], Any]] = [
        lambda codes: backend.contract(x, books, codes, signs, None),
        lambda codes: backend.contract(many, books, codes, None, None),
        lambda codes: backend.contract_t(y, books, codes, signs),
        lambda codes: backend.accumulate(x, y, codes, 3, 5, signs),
        lambda codes: backend.contract_grads(x, y, books, codes, None),
        lambda codes: backend.expand(books, codes, scale, None),
        lambda codes: backend.lookup(torch.tensor([3]), books, codes, scale, signs),
        lambda codes: backend.collect(randn(0, SPEC.num_vectors, SPEC.dim, dtype=F32), codes, 3, 5, None),
        lambda codes: backend.gather_sum(randn(0, 2, 2, 3, 5, 7, dtype=F32), codes),
        lambda codes: backend.bin_sum(randn(0, 2, SPEC.num_vectors, 7, dtype=F32), codes, 5),
    ]
    for call in calls:
        call(codes.to(code_dtype))
        with pytest.raises(IndexError, match="codes hold"):
            call(damaged)
    if backend is reference:
        with pytest.raises(CodeError):
            calls[0](damaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("wrong", [-1, 21, 2**40])
def test_rows_that_are_not_there_are_refused_as_torch_does(dtype: torch.dtype, columns: bool, wrong: int) -> None:
    from rpqfx.nn import RPQWeight
    from rpqfx.nn.layout import Layout

    spec = CodebookSpec(12, 21, 7, entries=5) if columns else CodebookSpec(21, 12, 4, entries=5)
    weight = RPQWeight(spec, Layout((21, 12), transposed=columns), dtype=dtype)
    for ids in (torch.tensor([0, wrong]), torch.tensor([[wrong]])):
        with pytest.raises(IndexError):
            weight(ids)
        with pytest.raises(IndexError), torch.no_grad():
            weight(ids)
    assert weight(torch.tensor([], dtype=torch.int64)).shape == (0, 12)


def test_no_rows_and_no_ids_are_no_exception() -> None:
    """Their results are empty, and so are the gradients: zeros."""
    books, codes, _, signs = stored(SPEC, 0, F32)
    books.requires_grad_()
    backend = choose(books, codes)
    for shape in ((0,), (0, 3), (2, 0)):
        x = torch.zeros(*shape, SPEC.dim)
        assert backend.contract(x, books.detach(), codes, signs, None).shape == (*shape, SPEC.num_vectors)
    torch.ops.rpqfx.contract(torch.zeros(0, SPEC.dim), books, codes, signs, None).sum().backward()
    torch.ops.rpqfx.lookup(torch.zeros(0, dtype=torch.int64), books, codes, None, signs).sum().backward()
    assert books.grad is not None and not books.grad.any()
