"""Claims on models of transformers whose attention is more than the usual: as the dense model, or refused at first."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rpqfx.errors import InputError, RewriteError
from rpqfx.kv import CodebookCache, KVPolicy, KVRule, attentions, commitment, quantize_kv
from tests.kv.parts import in_parts

transformers = pytest.importorskip("transformers")

_SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
_POLICY: dict[str, Any] = {
    "bits_per_value": 3,
    "window": 6,
    "sinks": 2,
    "chunk": 8,
    "codebook_dim": 4,
    "codebook_size": 16,
}


def made(name: str, **values: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = kind(config(**{**_SIZES, **values})).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            nn.init.normal_(parameter, 2, 1)
    return model


def llama(**values: Any) -> Any:
    return made("Llama", **values)


def ids(seed: int, batch: int = 2, length: int = 32) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def small_of(model: nn.Module, **values: Any) -> Any:
    policy = KVPolicy(**{**_POLICY, **values})
    return quantize_kv(model, policy, calibration=[ids(9, 2, 32)], fit=False, progress=False).eval()


_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS = {
    "soft cap": lambda: made(
        "Gemma2", head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=12
    ),
    "learned sinks, angles of half the width": lambda: made(
        "GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=2, sliding_window=12
    ),
    "two rotary bases": lambda: made("Gemma3", head_dim=8, sliding_window=12, **_LAYERS),
    "interleaved": lambda: made("Cohere"),
    "interleaved, angles in halves": lambda: made("Glm", head_dim=8),
    "called by its own code": lambda: made("Falcon"),
    "alibi": lambda: made("Falcon", alibi=True),
    "keys of another layer": lambda: made(
        "Gemma3n", head_dim=8, sliding_window=12, **_LAYERS, num_kv_shared_layers=2, vocab_size_per_layer_input=60,
        hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_the_dense_model_and_its_cache_the_whole_sequence(name: str) -> None:
    dense, x = MODELS[name](), ids(1, 2, 26)
    wide = small_of(dense, window=64)
    wanted = dense(x, use_cache=False).logits
    torch.testing.assert_close(wide(x, use_cache=False).logits, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(in_parts(wide, x, [9, 1, 16]), wanted, rtol=1e-3, atol=1e-4)
    small = small_of(dense)
    whole = small(x, use_cache=False).logits
    assert not torch.allclose(whole, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(in_parts(small, x, [4] + [1] * 14 + [8]), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [[16, 16], [4] * 8, [20, 12], [1] * 10 + [22]])
@torch.no_grad()
def test_many_tokens_at_once_find_their_own_windows(sizes: list[int]) -> None:
    small, x = small_of(llama()), ids(2)
    torch.testing.assert_close(in_parts(small, x, sizes), small(x, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_second_turn_goes_on_as_if_it_were_one() -> None:
    small, x = small_of(llama(eos_token_id=None)), ids(3, 1, 40)
    cache = CodebookCache.for_model(small)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    first = small.generate(x[:, :20], past_key_values=cache, **options)
    more = torch.cat([first, x[:, 20:]], 1)
    fresh = small.generate(more, past_key_values=CodebookCache.for_model(small), **options)
    assert torch.equal(small.generate(more, past_key_values=cache, **options), fresh)


@torch.no_grad()
def test_other_caches_are_refused_with_what_to_use() -> None:
    small, x = small_of(llama()), ids(4)
    cache = transformers.DynamicCache(config=small.config)
    small(x[:, :20], past_key_values=cache)
    with pytest.raises(InputError, match=r"CodebookCache\.for_model"):
        small(x[:, 20:21], past_key_values=cache)


@torch.no_grad()
def test_layers_that_are_skipped_keep_theirs_in_the_same_cache() -> None:
    dense, x = llama(eos_token_id=None), ids(5)
    small = small_of(dense, rules=(KVRule("model.layers.0.*", skip="why"),))
    assert list(attentions(small)) == ["model.layers.1.self_attn"]
    torch.testing.assert_close(in_parts(small, x, [9, 1, 22]), small(x, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    cache = CodebookCache.for_model(small)
    beams = small.generate(x[:, :9], past_key_values=cache, num_beams=3, do_sample=False, max_new_tokens=6)
    alone = small.generate(x[:, :9], use_cache=False, num_beams=3, do_sample=False, max_new_tokens=6)
    assert torch.equal(beams, alone)


def test_what_is_not_computed_is_refused_by_name_before_anything_is_fitted() -> None:
    with pytest.raises(RewriteError, match="attend to later ones"):
        small_of(transformers.BertModel(transformers.BertConfig(**{**_SIZES, "num_key_value_heads": 4})).eval())
    with pytest.raises(RewriteError, match=r"JetMoe.*cache of codes.*repeat"):
        small_of(made("JetMoe", num_local_experts=2, num_experts_per_tok=1, kv_channels=8))
    small, x = small_of(llama()), ids(6)
    with pytest.raises(InputError, match="sparsity="):
        small(x, sparsity=3, use_cache=False)
    with pytest.raises(InputError, match="output_attentions"):
        small(x, output_attentions=True, use_cache=False)


@torch.no_grad()
def test_threads_with_a_cache_each_get_what_they_get_alone() -> None:
    small = small_of(llama())
    inputs = [ids(seed, 1, 12 + seed) for seed in range(8)]
    wanted = [in_parts(small, x, [8] + [1] * (x.shape[1] - 8)) for x in inputs]
    found: list[Tensor | None] = [None] * 8
    start = threading.Barrier(8)

    def serve(number: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(4):
                found[number] = in_parts(small, inputs[number], [8] + [1] * (inputs[number].shape[1] - 8))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ours is not None and torch.equal(ours, one) for ours, one in zip(found, wanted, strict=True))


def trained(small: Any, reentrant: bool | None, with_loss: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, x = copy.deepcopy(small).train(), ids(7)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss = model(x, labels=x, use_cache=False).loss
    (loss + commitment(model) if with_loss else loss).backward()
    state = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return state, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("with_loss", [False, True])
def test_a_step_under_checkpointing_is_one_step(reentrant: bool, with_loss: bool) -> None:
    small = small_of(llama(), decay=0.9)
    if reentrant and with_loss:
        with pytest.raises(InputError, match="use_reentrant=False"):
            trained(small, reentrant, with_loss)
        return
    ours, wanted = trained(small, reentrant, with_loss), trained(small, None, with_loss)
    for found, expected in zip(ours, wanted, strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_layers_that_share_codebooks_take_one_step_and_serving_none() -> None:
    small, x = quantize_kv(llama(), KVPolicy(**_POLICY, decay=0.9), calibration=[ids(9, 2, 32)], progress=False), ids(8)
    quantizers = [side.quantizer for core in attentions(small).values() for side in (core.keys, core.values)]
    books, before = quantizers[0].codebooks, quantizers[0].codebooks.detach().clone()
    torch.testing.assert_close(quantizers[0].ema_sums / quantizers[0].ema_counts[..., None], before)
    small.train()
    with torch.no_grad():
        small(x, use_cache=False)
    assert torch.equal(books, before)
    small(x, labels=x, use_cache=False).loss.backward()
    assert not torch.equal(books, before)
    for quantizer in quantizers:
        assert quantizer.codebooks is books and int(quantizer.ema_steps) == 1
        assert torch.equal(quantizer.ema_sums, quantizers[0].ema_sums)


class Within(nn.Module):
    """What holds a model, as adapters do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.inner(x, **options)


@torch.no_grad()
def test_a_cache_is_made_for_what_wraps_the_model() -> None:
    small, x = small_of(llama()), ids(10, 1, 20)
    found = in_parts(Within(small), x, [9, 1, 10])
    torch.testing.assert_close(found, small(x, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_of_several_embeddings_is_saved_and_restored() -> None:
    small, x = small_of(MODELS["two rotary bases"]()), ids(11, 2, 30)
    cache, other = CodebookCache.for_model(small), CodebookCache.for_model(small)
    small(x[:, :24], past_key_values=cache)
    other.restore(copy.deepcopy(cache.state()))
    assert torch.equal(*(small(x[:, 24:], past_key_values=each).logits for each in (cache, other)))


@torch.no_grad()
def test_decoders_behind_an_encoder_are_served_and_the_encoder_is_left_alone() -> None:
    torch.manual_seed(0)
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    config = transformers.BartConfig(vocab_size=60, d_model=32, init_std=0.3, **sides)
    dense, source, x = transformers.BartForConditionalGeneration(config).eval(), ids(12, 2, 20), ids(13, 2, 24)
    batch = {"input_ids": source, "decoder_input_ids": x}
    small = quantize_kv(dense, KVPolicy(**_POLICY), calibration=[batch], fit=False, progress=False).eval()
    assert list(attentions(small)) == ["model.decoder.layers.0.self_attn"]
    whole, encoded = small(**batch, use_cache=False).logits, small.get_encoder()(source)
    assert not torch.allclose(whole, dense(**batch, use_cache=False).logits, atol=1e-3)
    cache = transformers.EncoderDecoderCache(CodebookCache.for_model(small), transformers.DynamicCache())
    steps = [small(encoder_outputs=encoded, decoder_input_ids=part, past_key_values=cache).logits
             for part in x.split([3, 1, 12, 8], 1)]  # fmt: skip
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="EncoderDecoderCache"):
        alone = CodebookCache.for_model(small)
        for part in x.split(12, 1):
            small(encoder_outputs=encoded, decoder_input_ids=part, past_key_values=alone)
