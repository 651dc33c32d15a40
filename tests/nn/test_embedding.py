"""RPQEmbedding and RPQEmbeddingBag are those of torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx.errors import InputError, SpecError
from rpqfx.nn import RPQEmbedding, RPQEmbeddingBag
from tests.helpers import (
    assert_equals_dense,
    assert_same,
    codebook_options,
    generator,
    randn,
    randomise,
    seeds,
)

norms = st.one_of(st.none(), st.floats(0.5, 3.0))


def table_args(data: st.DataObject, num: int, dim: int) -> dict[str, Any]:
    return {
        "num_embeddings": num, "embedding_dim": dim, "dtype": torch.float64,
        "padding_idx": data.draw(st.one_of(st.none(), st.integers(-num, num - 1))),
        "max_norm": data.draw(norms), "norm_type": data.draw(st.sampled_from([1.0, 2.0, 3.0])),
    }  # fmt: skip


def draw_ids(seed: int, num: int, *shape: int) -> Tensor:
    return torch.randint(num, shape, generator=generator(seed))


@given(
    st.data(), st.integers(1, 9), st.integers(1, 8), seeds, st.booleans(), st.booleans(),
    st.sampled_from([(), (1,), (6,), (2, 3), (0,)]), st.sampled_from([torch.int64, torch.int32]),
)  # fmt: skip
def test_embedding_equals_the_dense_layer(
    data: st.DataObject, num: int, dim: int, seed: int, by_freq: bool, sparse: bool, shape: tuple[int, ...],
    ids_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Same outputs and gradients: padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse."""
    args = {**table_args(data, num, dim), "scale_grad_by_freq": by_freq}
    layer = randomise(RPQEmbedding(**args, sparse=sparse, **data.draw(codebook_options([(num, dim)]))), seed)
    assert_equals_dense(layer, nn.Embedding(**args), draw_ids(seed, num, *shape).to(ids_dtype))


@given(
    st.data(), st.integers(1, 9), st.integers(1, 8), seeds, st.booleans(), st.booleans(),
    st.sampled_from(["sum", "mean", "max"]),
)  # fmt: skip
def test_embedding_bag_equals_the_dense_layer(
    data: st.DataObject, num: int, dim: int, seed: int, by_freq: bool, sparse: bool, mode: str
) -> None:
    """Same outputs and gradients: modes, offsets, include_last_offset, per_sample_weights, padding_idx, and so on.

    torch's own scale_grad_by_freq divides by another id's count on CPUs, so that argument is held to what its
    documentation says: the gradient of row i is divided by the number of times that i is in the batch.
    """
    args = {**table_args(data, num, dim), "mode": mode, "include_last_offset": data.draw(st.booleans())}
    by_freq = by_freq and mode != "max"  # torch has no such gradient
    sparse = sparse and mode != "max"
    options = data.draw(codebook_options([(num, dim)]))
    layer = randomise(RPQEmbeddingBag(**args, scale_grad_by_freq=by_freq, sparse=sparse, **options), seed)
    if args["include_last_offset"] or data.draw(st.booleans()):
        ids = draw_ids(seed, num, data.draw(st.integers(0, 8)))
        cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4))
        ends = [len(ids)] if args["include_last_offset"] else []
        offsets = torch.tensor([0, *sorted(cuts), *ends])
    else:
        ids, offsets = draw_ids(seed, num, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))), None
    weights = randn(seed, *ids.shape) if mode == "sum" and data.draw(st.booleans()) else None

    def call(dense: nn.Module, parameters: dict[str, Tensor], ids: Tensor, *rest: Any) -> Tensor:
        if by_freq:
            uses = torch.bincount(ids.flatten(), minlength=num).clamp_min(1)
            fixed = parameters["weight"].detach()
            parameters = {"weight": fixed + (parameters["weight"] - fixed) / uses[:, None]}
        return torch.func.functional_call(dense, parameters, (ids, *rest))

    assert_equals_dense(layer, nn.EmbeddingBag(**args), ids, offsets, weights, call=call)


@pytest.mark.parametrize("layer", [RPQEmbedding, RPQEmbeddingBag])
@pytest.mark.parametrize("signs", [False, True])
def test_the_padding_row_is_zero_and_stays_zero(layer: type, signs: bool) -> None:
    """Although its codes point to entries that other rows train."""
    table = layer(10, 8, padding_idx=-3, codebook_dim=4, codebook_bits=2, signs=signs)
    assert table.padding_idx == 7
    optimiser = torch.optim.SGD(table.parameters(), lr=1.0)
    for _ in range(3):
        assert torch.equal(table.weight[7], torch.zeros(8))
        assert torch.equal(table(torch.tensor([[7]])), torch.zeros(1, 1, 8).reshape(table(torch.tensor([[7]])).shape))
        before = table.weight.detach().clone()
        table(torch.tensor([[1, 7], [2, 3]])).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        assert not torch.equal(table.weight, before)


@pytest.mark.parametrize("layer", [RPQEmbedding, RPQEmbeddingBag])
@pytest.mark.parametrize("filled", [False, True])
def test_a_padding_row_is_zero_where_the_dense_one_is(layer: type, filled: bool) -> None:
    """One with values is fitted as any other row, trains nothing, and moves with the entries that it shares."""
    dense = layer._dense(16, 8, padding_idx=5)
    with torch.no_grad():
        dense.weight.copy_(randn(0, 16, 8))
        if not filled:
            dense.weight[5] = 0.0
    table = layer.from_dense(dense, codebook_dim=4, codebook_bits=2)
    fitted = table.weight[5].detach().clone()
    assert bool(fitted.any()) is filled
    table(torch.tensor([[5]])).square().sum().backward()
    assert table.weight_rpq.codebooks.grad.abs().sum() == 0
    table(torch.arange(16)[:, None]).square().sum().backward()
    with torch.no_grad():
        table.weight_rpq.codebooks -= 0.1 * table.weight_rpq.codebooks.grad
    assert torch.equal(table.weight[5], fitted) is not filled


def test_bags_do_not_count_the_padding_row() -> None:
    table = RPQEmbeddingBag(10, 8, padding_idx=7, mode="mean", codebook_dim=4, codebook_bits=2)
    assert_same(table(torch.tensor([[1, 7, 2]])), table.weight[[1, 2]].mean(0, keepdim=True), tolerance=1e-6)


def test_max_norm_shrinks_what_is_looked_up_and_leaves_the_codebooks() -> None:
    table = RPQEmbedding(10, 8, max_norm=0.5, codebook_dim=4, codebook_bits=2)
    before = table.weight_rpq.codebooks.detach().clone()
    assert table(torch.arange(10)).norm(dim=-1).max() < 0.5 + 1e-6
    assert torch.equal(table.weight_rpq.codebooks, before)


@pytest.mark.parametrize("layer", [RPQEmbedding, RPQEmbeddingBag])
def test_sparse_gradients_work_with_an_optimiser(layer: type) -> None:
    """One step of SGD moves the table as its dense gradient would."""
    tables = [randomise(layer(10, 8, sparse=sparse, codebook_dim=4, codebook_bits=2), 0) for sparse in (False, True)]
    for table in tables:
        optimiser = torch.optim.SGD(table.parameters(), lr=0.1)
        table(torch.tensor([[1, 1, 2]])).square().sum().backward()
        assert table.weight_rpq.codebooks.grad.is_sparse == table.sparse
        optimiser.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)


@pytest.mark.parametrize("layer", [RPQEmbedding, RPQEmbeddingBag])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_rows_are_looked_up_by_integers(layer: type, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"looked up by integers, got {dtype}"):
        layer(10, 8, codebook_dim=4)(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("layer", [RPQEmbedding, RPQEmbeddingBag])
@pytest.mark.parametrize("bad", [-1, 10])
@pytest.mark.parametrize("by_freq", [False, True])
def test_ids_outside_the_table_are_refused(layer: type, bad: int, by_freq: bool) -> None:
    """As by torch.nn: a negative id does not count from the end."""
    with pytest.raises((IndexError, RuntimeError)):
        layer(10, 8, codebook_dim=4, scale_grad_by_freq=by_freq)(torch.tensor([[1, bad]]))


@pytest.mark.parametrize("layer", [RPQEmbedding, RPQEmbeddingBag])
def test_from_pretrained_is_the_given_table(layer: type) -> None:
    """With as many entries as rows, exactly; frozen as asked."""
    rows = randn(0, 16, 8, dtype=torch.float32)
    table = layer.from_pretrained(rows, freeze=True, padding_idx=2, codebook_dim=4, codebook_bits=4)
    assert type(table) is layer and table.padding_idx == 2
    keep = torch.arange(16) != 2
    assert torch.equal(table.weight[keep], rows[keep])
    assert not table.weight_rpq.codebooks.requires_grad
    assert layer.from_pretrained(rows, freeze=False).weight_rpq.codebooks.requires_grad
    assert layer.from_pretrained(rows, plan="dequantize").weight_rpq.plan == "dequantize"


@pytest.mark.parametrize("layer", [RPQEmbedding, RPQEmbeddingBag])
def test_columns_are_refused(layer: type) -> None:
    with pytest.raises(SpecError, match="split='column' does not apply"):
        layer(10, 8, split="column")
