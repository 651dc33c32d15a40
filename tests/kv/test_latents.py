"""Claims on attention whose cache holds latents."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rpqfx
from rpqfx.kv import CodebookCache, KVPolicy, attentions, commitment, quantize_kv
from tests.kv.parts import in_parts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


def deepseek() -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3, "head_dim": 8,
    }  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()
    if not hasattr(type(model.model.layers[0].self_attn), "expand_kv"):
        pytest.skip("this transformers caches expanded keys")
    return model


def ids(seed: int, batch: int = 2, length: int = 28) -> Tensor:
    return torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def small_of(dense: Any, **values: Any) -> Any:
    policy = KVPolicy(
        **{"bits_per_value": 3, "window": 4, "sinks": 2, "codebook_size": 16, "chunk": 8, "codebook_dim": 4, **values}
    )
    return quantize_kv(dense, policy, calibration=[ids(9, 4)], seed=0, progress=False).eval()


@torch.no_grad()
def test_with_a_window_over_all_tokens_nothing_changes() -> None:
    dense, x = deepseek(), ids(1)
    torch.testing.assert_close(small_of(dense, window=64)(x).logits, dense(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 28, [5, 9, 14], [14] + [1] * 14, [28]], ids=str)
@torch.no_grad()
def test_tokens_in_parts_are_as_all_at_once(sizes: list[int]) -> None:
    small, x = small_of(deepseek()), ids(1)
    whole = small(x, use_cache=False).logits
    torch.testing.assert_close(in_parts(small, x, sizes), whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_is_in_codes_is_the_latent() -> None:
    small, x = small_of(deepseek()), ids(1)
    cache = CodebookCache.for_model(small)
    small(x, past_key_values=cache)
    store = next(iter(cache.stores.values()))
    assert (store.keys.coder.heads, store.keys.coder.dim, store.values.coder.dim) == (1, 16, 8)
    assert store.encoded == 16


@torch.no_grad()
def test_copies_pickles_files_and_beams(tmp_path: Path) -> None:
    small, x = small_of(deepseek()), ids(1)
    wanted = small(x, use_cache=False).logits
    rpqfx.save(small, tmp_path / "m.rpq")
    loaded = rpqfx.load(tmp_path / "m.rpq", deepseek).eval()
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        assert torch.equal(twin(x, use_cache=False).logits, wanted)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(small.generate(x, **options), small.generate(x, use_cache=False, **options))


def test_training_gives_a_loss_and_gradients_pass_straight() -> None:
    small, x = small_of(deepseek(), decay=0.9).train(), ids(7)
    before = {name: value.clone() for name, value in small.named_buffers() if "ema" in name}
    (small(x, labels=x, use_cache=False).loss + commitment(small)).backward()
    assert all(p.grad is not None for name, p in small.named_parameters() if "kv_" in name and "proj" in name)
    assert len(attentions(small)) == 2
    assert any(not torch.equal(value, before[name]) for name, value in small.named_buffers() if name in before)


def test_it_compiles_as_the_dense_model_does() -> None:
    dense, x = deepseek(), ids(1)
    small = small_of(dense)
    for model in (dense, small):
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(
            compiled(x, use_cache=False).logits, model(x, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )
