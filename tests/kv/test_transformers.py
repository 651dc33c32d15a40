"""Claims on models of transformers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.errors import InputError, PolicyError
from rpqfx.kv import CodebookCache, KVPolicy, KVRule, attentions, quantize_kv
from tests import forks

transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_POLICY = {"bits_per_value": 3, "window": 6, "sinks": 2, "chunk": 8, "codebook_dim": 4, "codebook_size": 16}


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, initializer_range=0.3)).eval()


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 128}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, initializer_range=0.3, eos_token_id=None)
    ).eval()


def ids(seed: int, batch: int = 2, length: int = 32) -> Tensor:
    return torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def small_of(model: nn.Module, **values: Any) -> Any:
    return quantize_kv(model, KVPolicy(**{**_POLICY, **values}), calibration=[ids(9, 8)], progress=False)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("keys", ["auto", "after"])
@torch.no_grad()
def test_token_by_token_is_the_whole_sequence(make: Any, keys: str) -> None:
    small, x = small_of(make(), keys=keys), ids(1)
    whole = small(x, use_cache=False).logits
    cache = CodebookCache.for_model(small)
    steps = [small(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(x.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3)
    assert cache.total == 32 and min(store.encoded for store in cache.stores.values()) == 24
    assert (cache.nbytes()["positions"] > 0) == (make is llama and keys == "auto")


@torch.no_grad()
def test_the_original_is_left_alone() -> None:
    model, x = llama(), ids(1)
    before = model(x).logits
    small = small_of(model)
    assert torch.equal(model(x).logits, before)
    assert not attentions(model) and len(attentions(small)) == 2
    assert not torch.allclose(small(x, use_cache=False).logits, before, atol=1e-4)


@torch.no_grad()
def test_with_a_window_over_all_tokens_nothing_changes() -> None:
    model, x = llama(), ids(1)
    small = small_of(model, window=64)
    torch.testing.assert_close(small(x, use_cache=False).logits, model(x).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_goes_by_the_cache() -> None:
    small, x = small_of(llama()), ids(3, 1, 20)
    cache = CodebookCache.for_model(small)
    found = small.generate(x, past_key_values=cache, max_new_tokens=12, do_sample=False)
    steps = CodebookCache.for_model(small)
    logits, wanted = small(x, past_key_values=steps).logits, x
    for _ in range(12):
        wanted = torch.cat([wanted, logits[:, -1:].argmax(-1)], 1)
        logits = small(wanted[:, -1:], past_key_values=steps).logits
    assert torch.equal(found, wanted)
    assert cache.total == 31


@torch.no_grad()
def test_beams_are_rows_that_change_places() -> None:
    small, x = small_of(llama()), ids(4, 2, 20)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    together = small.generate(x, past_key_values=CodebookCache.for_model(small), **options)
    for row, one in zip(x, together, strict=True):
        alone = small.generate(row[None], past_key_values=CodebookCache.for_model(small), **options)
        assert torch.equal(alone[0], one)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing_but_which_tokens_are_sinks() -> None:
    small, x = small_of(llama(), sinks=0), ids(5, 1, 24)
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.int64), x], 1)
    mask = (torch.arange(32) >= 8).long()[None]
    found = small(padded, attention_mask=mask, past_key_values=CodebookCache.for_model(small)).logits[:, 8:]
    wanted = small(x, past_key_values=CodebookCache.for_model(small)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    options = {"max_new_tokens": 8, "do_sample": False}
    one = small.generate(padded, attention_mask=mask, past_key_values=CodebookCache.for_model(small), **options)
    other = small.generate(x, past_key_values=CodebookCache.for_model(small), **options)
    assert torch.equal(one[:, 32:], other[:, 24:])


@torch.no_grad()
def test_copies_pickles_and_states() -> None:
    small, x = small_of(llama()), ids(6)
    wanted = small(x, use_cache=False).logits
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x, use_cache=False).logits, wanted)
    fresh = quantize_kv(llama(1), KVPolicy(**_POLICY), calibration=[x[:1, :4]], fit=False)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x, use_cache=False).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("keys", ["auto", "after"])
def test_a_cache_is_copied_and_goes_with_a_copy_of_the_model(keys: str) -> None:
    small, x = small_of(llama(), keys=keys), ids(6)
    cache = CodebookCache.for_model(small)
    small(x[:, :20], past_key_values=cache)
    wanted = small(x[:, 20:], past_key_values=copy.deepcopy(cache)).logits
    for other in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(other(x[:, 20:], past_key_values=twin).logits, wanted)
    assert cache.total == 20


@torch.no_grad()
def test_a_cache_of_a_model_with_other_codebooks_is_refused() -> None:
    small, x = small_of(llama()), ids(6)
    cache = CodebookCache.for_model(small)
    small(x[:, :20], past_key_values=cache)
    with pytest.raises(InputError, match="other codebooks"):
        small_of(llama(1))(x[:, 20:], past_key_values=cache)
    assert cache.total == 20


@torch.no_grad()
def test_a_process_that_unpickles_a_model_can_run_it(tmp_path: Path) -> None:
    small, x = small_of(llama()), ids(6)
    torch.save((small, x, small(x, use_cache=False).logits), tmp_path / "whole.pt")
    done = forks.run(
        "import sys, torch\n"
        "small, x, wanted = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(small(x, use_cache=False).logits, wanted)\n"
        "print(type(small.model.layers[0].self_attn.kv_codes).__name__)\n",
        str(tmp_path / "whole.pt"),
    )
    assert (done.returncode, done.stdout) == (0, "KVAttention\n"), done.stderr


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=None,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def caches(monkeypatch: pytest.MonkeyPatch) -> list[CodebookCache]:
    """The caches that are made from now on."""
    made: list[CodebookCache] = []
    before = CodebookCache.for_model.__func__  # type: ignore[attr-defined]

    def for_model(cls: Any, *args: Any) -> CodebookCache:
        made.append(before(cls, *args))
        return made[-1]

    monkeypatch.setattr(CodebookCache, "for_model", classmethod(for_model))
    return made


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "dynamic"}], ids=str)
@torch.no_grad()
def test_generate_makes_a_cache_of_codes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small, x = small_of(llama()), ids(3, 1, 20)
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    own = {name: value for name, value in options.items() if name != "cache_implementation"}
    wanted = small.generate(x, past_key_values=CodebookCache.for_model(small), **own)
    made = caches(monkeypatch)
    for model in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(model.generate(x, **options), wanted)
    assert [cache.total for cache in made] == [31] * 3
    small.generate(x, use_cache=False, **own)
    assert len(made) == 3


@torch.no_grad()
def test_generate_of_a_loaded_model_makes_a_cache_of_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small, x = small_of(llama()), ids(3, 1, 20)
    rpqfx.save(small, tmp_path / "m.rpq")
    made = caches(monkeypatch)
    again = rpqfx.load(tmp_path / "m.rpq", llama).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(x, **options), small.generate(x, **options)) and len(made) == 2


@torch.no_grad()
def test_generate_of_an_encoder_and_a_decoder_makes_a_cache_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = ids(3, 2, 9)
    batch = {"input_ids": x, "decoder_input_ids": ids(4, 2, 24)}
    small = quantize_kv(t5(), KVPolicy(**_POLICY), calibration=[batch], progress=False)
    made = caches(monkeypatch)
    out = small.generate(x, max_new_tokens=20, do_sample=False)
    assert out.shape == (2, 21) and [cache.total for cache in made] == [20]
    assert min(store.encoded for store in made[0].stores.values()) > 0


@pytest.mark.parametrize("asked", ["static", "offloaded", "quantized"])
def test_other_caches_are_refused_before_generation_begins(asked: str) -> None:
    small = small_of(llama())
    with pytest.raises(InputError, match=rf"cache_implementation='{asked}' makes a cache that holds no codes"):
        small.generate(ids(3, 1, 20), max_new_tokens=3, cache_implementation=asked)


def test_layers_that_differ() -> None:
    rules = (KVRule("model.layers.0.*", bits_per_value=6), KVRule("model.layers.1.*", bits_per_value=1))
    small = small_of(llama(), rules=rules)
    counts = [core.keys.code_count + core.values.code_count for core in attentions(small).values()]
    assert counts[0] > 3 * counts[1]
    with pytest.raises(PolicyError, match="matches no"):
        small_of(llama(), rules=(KVRule("encoder.*", bits_per_value=2),))


def test_training_gives_a_loss_and_gradients_pass_straight() -> None:
    small, x = small_of(llama()).train(), ids(7)
    from rpqfx.kv import commitment

    loss = small(x, labels=x, use_cache=False).loss
    (loss + commitment(small)).backward()
    core = next(iter(attentions(small).values()))
    assert core.keys.quantizer.codebooks.grad is not None
    assert all(p.grad is not None for name, p in small.named_parameters() if "proj" in name)


@torch.no_grad()
@pytest.mark.parametrize(("make", "keys"), [(gpt2, "auto"), (llama, "after"), (llama, "auto")])
def test_a_static_cache_is_refused_where_it_would_count_tokens_that_have_not_come(make: Any, keys: str) -> None:
    small, x = small_of(make(), keys=keys), ids(3)
    with pytest.raises(InputError, match=r"fixed size.*CodebookCache\.for_model"):
        small(x, past_key_values=transformers.StaticCache(config=small.config, max_cache_len=64))


@torch.no_grad()
def test_a_cache_of_a_sliding_window_is_refused_once_it_has_tokens() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**_SIZES, initializer_range=0.3, sliding_window=12)
    small, x = small_of(transformers.MistralForCausalLM(config).eval(), keys="after"), ids(3)
    cache = transformers.DynamicCache(config=config)
    found = small(x[:, :20], past_key_values=cache).logits
    torch.testing.assert_close(found, small(x, use_cache=False).logits[:, :20], rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match=r"sliding window alone.*CodebookCache\.for_model"):
        small(x[:, 20:21], past_key_values=cache)


@torch.no_grad()
def test_assisted_decoding_gives_what_plain_decoding_gives() -> None:
    for window in (0, 6):
        small, x = small_of(llama(), window=window), ids(1, 1) % 8 + 2
        options = {"max_new_tokens": 16, "do_sample": False}
        plain = small.generate(x, **options)
        for more in ({"prompt_lookup_num_tokens": 9}, {"assistant_model": llama()}, {"assistant_model": llama(1)}):
            assert torch.equal(small.generate(x, **options, **more), plain)
