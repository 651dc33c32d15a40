"""Claims on attention that a module multiplies out itself."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.kv import CodebookCache, KVPolicy, KVRule, attentions, commitment, quantize_kv
from tests.kv.kv_models import LM, tokens
from tests.kv.written_models import WAYS, Written, WrittenLM, matmul, operators, weigh

_POLICY: dict[str, Any] = {
    "bits_per_value": 3,
    "window": 6,
    "sinks": 2,
    "chunk": 8,
    "codebook_dim": 4,
    "codebook_size": 16,
}


def small_of(model: nn.Module, **values: Any) -> Any:
    return quantize_kv(model, KVPolicy(**{**_POLICY, **values}), calibration=[tokens(9, 4)], progress=False)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_it_gives_what_the_fused_function_gives_on_the_same_codes(way: Callable[..., Tensor]) -> None:
    fused, written, x = small_of(LM().eval()), small_of(WrittenLM(way).eval()), tokens(1)
    state = fused.state_dict()
    assert written.load_state_dict(state, strict=True) and list(attentions(written)) == ["layers.0", "layers.1"]
    torch.testing.assert_close(written(x), fused(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(written(x), LM()(x), atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_with_a_window_over_all_tokens_nothing_changes(way: Callable[..., Tensor]) -> None:
    model, x = WrittenLM(way).eval(), tokens(1)
    assert torch.equal(small_of(model, window=64)(x), model(x))


def test_training_is_that_of_the_fused_function_on_the_same_codes() -> None:
    fused, written, x = small_of(LM()), small_of(WrittenLM()), tokens(1)
    written.load_state_dict(fused.state_dict())
    gradients = []
    for model in (fused.train(), written.train()):
        (model(x).logsumexp(-1).mean() + commitment(model)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert set(gradients[0]) == set(gradients[1])
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_moving_averages_take_the_steps_of_the_fused_function() -> None:
    fused, written, x = small_of(LM(), decay=0.9), small_of(WrittenLM(), decay=0.9), tokens(1)
    written.load_state_dict(fused.state_dict())
    for model in (fused.train(), written.train()):
        model(x).logsumexp(-1).mean().backward()
    wanted = fused.state_dict()
    for name, found in written.state_dict().items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_query_sees_changed_scores_of_codes_where_the_module_changes_scores() -> None:
    """The code between the products is the module's own: here a soft cap, a bias by distance, and masked weights."""

    def changed(scores: Tensor) -> Tensor:
        ahead = torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-2])[:, None]
        return (weigh(torch.tanh(scores / 3) * 3 + ahead * 0.1)).clamp_min(1e-3).tril()

    model, x = WrittenLM(weigh=changed).eval(), tokens(1)
    small = small_of(model, window=64)
    assert torch.equal(small(x), model(x))
    small = small_of(model, sinks=0, window=0)
    core, layer = small.layers[0].kv_codes, small.layers[0]
    h = small.norms[0](small.table(x))
    q, k, v = (f(h).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    near = core.near(40, 40, x.device)
    (far_k, _), (far_v, _) = core.keys(k), core.values(v)
    k, v, far_k, far_v = (t.repeat_interleave(2, 1) for t in (k, v, far_k, far_v))
    w = changed(torch.where(near, q @ k.mT, q @ far_k.mT) * 8**-0.5)
    wanted = (w * near) @ v + (w * ~near) @ far_v
    torch.testing.assert_close(layer(h), layer.out(wanted.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_pickles_and_files_give_the_same(tmp_path: Path) -> None:
    small, x = small_of(WrittenLM().eval()), tokens(1)
    wanted = small(x)
    rpqfx.save(small, tmp_path / "m.rpq")
    loaded = rpqfx.load(tmp_path / "m.rpq", WrittenLM).eval()
    rpqfx.save_calibration(small, tmp_path / "c.rpq")
    again = quantize_kv(WrittenLM().eval(), tmp_path / "c.rpq")
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded, again):
        assert torch.equal(twin(x), wanted)


@torch.no_grad()
def test_threads_share_a_model() -> None:
    small = small_of(WrittenLM(operators).eval())
    inputs = [tokens(seed, 1 + seed % 3, 24 + seed) for seed in range(6)]
    wanted, found = [small(x) for x in inputs], {}

    def run(number: int) -> None:
        found[number] = small(inputs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted[number]) for number in range(len(inputs)))


@pytest.mark.traced
@pytest.mark.parametrize("train", [False, True])
def test_it_compiles_as_one_graph(train: bool) -> None:
    small, x = small_of(WrittenLM(layers=1)).train(train), tokens(1)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-4, atol=1e-4)
    compiled(x).logsumexp(-1).mean().backward()
    assert small.layers[0].k.weight.grad is not None


def test_a_cache_cannot_be_attended_to_from_outside() -> None:
    small, x = small_of(WrittenLM().eval()), tokens(1)
    cache = CodebookCache(small)
    with pytest.raises(InputError, match=r"layers\.0 makes its scores and masks them itself"), cache.attended():
        small(x)


def test_keys_before_a_rotary_embedding_are_refused_before_anything_is_fitted() -> None:
    with pytest.raises(InputError, match="shows no rotary embedding"):
        small_of(WrittenLM(), keys="before")


def test_rules_and_numbers_of_layers_skip_it() -> None:
    small = small_of(WrittenLM(), rules=(KVRule("layers.0", skip="as it is"),))
    assert list(attentions(small)) == ["layers.1"]
    assert list(attentions(small_of(WrittenLM(), skip_layers=(-1,)))) == ["layers.0"]
    with pytest.raises(PolicyError, match="skip every"):
        small_of(WrittenLM(), skip_layers=(0, 1))


def test_an_encoder_is_refused_with_the_reason() -> None:
    with pytest.raises(RewriteError, match=r"layers\.0: .*attend to later ones.*use_cache=False"):
        small_of(WrittenLM(weigh=lambda scores: scores.softmax(-1)))


def test_a_call_that_makes_another_number_of_such_products_is_refused() -> None:
    class Turns(Written):
        """In train mode queries meet keys twice."""

        def forward(self, x: Tensor) -> Tensor:
            def more(q: Tensor, k: Tensor, v: Tensor, weigh: Any) -> Tensor:
                out = matmul(q, k, v, weigh)
                return out + (q @ k.mT).mean() if self.training else out

            self.way = more
            return super().forward(x)

    model = WrittenLM()
    model.layers[1] = Turns(torch.Generator().manual_seed(0))
    small = small_of(model)
    small.eval()(tokens(1))
    with pytest.raises(InputError, match=r"layers\.1 made 3 products in this call, 2 in calibration"):
        small.train()(tokens(1))


def test_what_is_raised_within_an_operator_says_what_is_wrong() -> None:
    small = small_of(WrittenLM(operators)).eval()
    core = small.layers[0].kv_codes
    core.policy = dataclasses.replace(core.policy, keys="before")
    with pytest.raises(InputError, match=r"layers\.0 shows no rotary embedding"):
        small(tokens(1))


def test_products_of_layers_with_weights_do_not_count() -> None:
    class Turned(nn.Module):
        """Turns blocks of channels by an orthogonal matrix (Qiu et al., 2306.07280)."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.blocks = inner, nn.Parameter(torch.eye(8).repeat(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            parts = x.unflatten(-1, (4, 8)).flatten(0, 1).transpose(0, 1)
            rotated = torch.bmm(parts, self.blocks).transpose(0, 1).reshape(x.shape)
            return self.inner(rotated @ torch.eye(32))

    small, x = small_of(WrittenLM()).eval(), tokens(1)
    wanted = small(x)
    small.layers[0].q = Turned(small.layers[0].q)
    torch.testing.assert_close(small(x), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_calls_of_other_batch_sizes_find_samples_and_heads() -> None:
    for way in WAYS:
        small, x = small_of(WrittenLM(way).eval()), tokens(1, 5)
        alone = torch.cat([small(row[None]) for row in x])
        torch.testing.assert_close(small(x), alone, rtol=1e-4, atol=1e-4)
