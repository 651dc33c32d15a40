"""Claims on models whose older keys and values are codes."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx import Policy, rpqify
from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.kv import KVPolicy, KVRule, attentions, commitment, quantize_kv
from rpqfx.kv.module import KVAttention
from tests.kv.kv_models import LM, WIDTH, tokens

POLICY = KVPolicy(bits_per_value=2, window=6, sinks=2, chunk=8, codebook_dim=4, codebook_size=16)
FEW = dataclasses.replace(POLICY, bits_per_value=0.5)  # of few codes, whose searches make few nodes of a graph


def small_of(model: nn.Module, policy: KVPolicy = POLICY, batch: object = None) -> nn.Module:
    return quantize_kv(model, policy, calibration=[tokens(0, 4, 64) if batch is None else batch], progress=False)


class Direct(nn.Module):
    """Attends to what it is given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 3), st.sampled_from([8, 16, 24]), st.booleans())
@settings(max_examples=15)
def test_a_query_sees_what_a_cache_would_hold(seed: int, window: int, sinks: int, chunk: int, causal: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8, generator=torch.Generator().manual_seed(seed))
    policy = KVPolicy(bits_per_value=1, window=window, sinks=sinks, chunk=chunk, codebook_dim=4, codebook_size=4)
    small = small_of(Direct(), policy, (q, k, v))
    (core,) = attentions(small).values()
    made_k, made_v = core.keys(k)[0], core.values(v)[0]
    bias = torch.randn(30, 30)
    found = small(q, k, v, None if causal else bias, causal)
    for t in range(30):
        coded = sinks + max(0, t + 1 - sinks - window) // chunk * chunk
        far = (torch.arange(30) >= sinks) & (torch.arange(30) < coded)
        keys, values = (torch.where(far[:, None], a, b) for a, b in ((made_k, k), (made_v, v)))
        seen = torch.where(torch.arange(30) <= t, 0.0, float("-inf")) if causal else bias[t]
        wanted = F.scaled_dot_product_attention(q[:, :, t : t + 1], keys, values, seen[None])
        torch.testing.assert_close(found[:, :, t : t + 1], wanted, rtol=1e-4, atol=1e-4)


def test_the_original_is_left_alone_and_inplace_is_it() -> None:
    model, ids = LM(), tokens(1)
    before, names = model(ids), list(model.state_dict())
    small = small_of(model)
    assert torch.equal(model(ids), before) and list(model.state_dict()) == names
    assert not torch.allclose(small(ids), before, atol=1e-3)
    assert set(names) < set(small.state_dict())
    twin = copy.deepcopy(model)
    assert quantize_kv(twin, POLICY, calibration=[tokens(0, 4, 64)], inplace=True, progress=False) is twin
    torch.testing.assert_close(twin(ids), small(ids))


def test_copies_pickles_and_states() -> None:
    small, ids = small_of(LM()), tokens(1)
    wanted = small(ids)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(ids), wanted)
    fresh = quantize_kv(LM(3), POLICY, calibration=[ids], fit=False)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(ids), wanted)


def test_more_bits_are_nearer() -> None:
    model, ids = LM(), tokens(1, 4)
    errors = []
    for bits in (0.5, 1, 2, 4):
        small = small_of(
            model, KVPolicy(bits_per_value=bits, window=0, sinks=0, codebook_dim=4, codebook_size=16, chunk=8, stages=8)
        )
        errors.append(float((small(ids) - model(ids)).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


class Stack(nn.Module):
    """Of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.body(x, mask=mask, is_causal=True)


def test_torchs_own_attention() -> None:
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 40, WIDTH)
    with torch.no_grad():
        whole = small_of(model, KVPolicy(bits_per_value=2, window=64, codebook_dim=4, codebook_size=16), x)
        torch.testing.assert_close(whole(x), model(x), rtol=1e-4, atol=1e-4)
        small = small_of(model, POLICY, x)
        assert len(attentions(small)) == 2
        assert not torch.allclose(small(x), model(x), atol=1e-3)  # torch's fused layer would not see the codes
    attention = next(m for m in small.modules() if isinstance(m, nn.MultiheadAttention))
    with pytest.raises(InputError, match="need_weights=False"):
        attention(x, x, x)


def test_with_quantized_weights_too() -> None:
    model, ids = LM(), tokens(1)
    held = rpqify(model, Policy(codebook_dim=4, codebook_bits=4, min_size=0))
    small = small_of(held)
    assert len(attentions(small)) == 2
    assert not torch.allclose(small(ids), held(ids), atol=1e-3)


def test_training() -> None:
    small, ids = small_of(LM()).train(), tokens(2)
    with pytest.raises(InputError, match="train"):
        commitment(small_of(LM()))
    loss = F.cross_entropy(small(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + commitment(small)
    loss.backward()
    assert all(p.grad is not None for name, p in small.named_parameters() if "mean" in name or "codebooks" in name)


@pytest.mark.traced
@pytest.mark.parametrize("mode", ["eval", pytest.param("train", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_in_one_graph(backend: str, mode: str) -> None:
    torch.compiler.reset()
    small, ids = small_of(LM(layers=1), FEW).train(mode == "train"), tokens(3)
    compiled = torch.compile(small, fullgraph=True, backend=backend)
    found = compiled(ids)
    torch.testing.assert_close(found, small(ids), rtol=1e-3, atol=1e-3)
    if mode == "train":
        found.square().mean().backward()
        assert all(parameter.grad is not None for parameter in small.parameters() if parameter.requires_grad)


@pytest.mark.traced
def test_inductor_finds_the_keys_that_stay_as_they_are() -> None:
    core = next(iter(attentions(small_of(LM(layers=1), FEW)).values()))
    sinks, window, chunk = core.policy.sinks, core.policy.window, core.policy.chunk
    compiled = torch.compile(lambda x: core.near(*x.shape, x.device), fullgraph=True)
    for queries, keys in ((40, 40), (3, 40), (17, 29)):
        near = core.near(queries, keys, torch.device("cpu"))
        assert torch.equal(compiled(torch.zeros(queries, keys)), near)
        for row, seen in zip(near, range(keys - queries + 1, keys + 1), strict=True):
            coded = max(0, seen - sinks - window) // chunk * chunk  # by the definition: whole chunks before the window
            assert [not value for value in row.tolist()] == [sinks <= at < sinks + coded for at in range(keys)]


@pytest.mark.traced
def test_it_exports() -> None:
    small, ids = small_of(LM(layers=1), FEW), tokens(3)
    exported = torch.export.export(small, (ids,)).module()
    torch.testing.assert_close(exported(ids), small(ids), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_done_is_said_and_nothing_is_half_done() -> None:
    model = LM()
    with pytest.raises(RewriteError, match="no attention"):
        quantize_kv(nn.Linear(3, 3), calibration=[torch.ones(1, 3)])
    with pytest.raises(InputError, match="no calibration"):
        quantize_kv(model, calibration=[])
    with pytest.raises(InputError, match="rejects"):
        quantize_kv(model, POLICY, calibration=[torch.randn(2, 3)], inplace=True, progress=False)
    with pytest.raises(PolicyError, match="skip every"):
        quantize_kv(model, KVPolicy(rules=(KVRule("*", skip="why"),)), calibration=[tokens(0)])
    with pytest.raises(PolicyError, match="do not divide"):
        quantize_kv(model, KVPolicy(codebook_dim=7), calibration=[tokens(0)], inplace=True, progress=False)
    with pytest.raises(InputError, match="rotary"):
        quantize_kv(model, KVPolicy(keys="before"), calibration=[tokens(0)], inplace=True, progress=False)
    assert not any(isinstance(module, KVAttention) for module in model.modules())
    assert type(model.layers[0]).__mro__[1] is nn.Module
    small = small_of(LM())
    with pytest.raises(RewriteError, match="already"):
        small_of(small)
    q = torch.randn(1, 3, 5, 8)
    core = next(iter(attentions(small).values()))
    with pytest.raises(InputError, match="as in calibration"):
        core(q, q, q)
