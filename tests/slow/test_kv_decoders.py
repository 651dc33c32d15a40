"""Small random decoders of transformers with their keys and values in codes: as the dense model, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rpqfx.errors import RewriteError
from rpqfx.kv import KVPolicy, quantize_kv
from tests.kv.parts import in_parts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

_BASE: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
_HEAD: dict[str, Any] = {"head_dim": 16}
_TYPES: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MOE: dict[str, Any] = {"num_experts_per_tok": 1, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 2, **_MOE,
}  # fmt: skip
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4}

SERVED: dict[str, dict[str, Any]] = {
    "Apertus": {}, "Arcee": {}, "BitNet": {}, "Cohere": {}, "Cohere2": {"sliding_window": 12},
    "Dots1": {**_MOE, "n_routed_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}, "Ernie4_5": _HEAD,
    "Exaone4": {"sliding_window": 12}, "Falcon": {}, "GPTJ": {**_GPT2, "rotary_dim": 8},
    "GPTNeoX": {"num_key_value_heads": 4}, "Gemma": _HEAD,
    "Gemma2": {**_HEAD, "attn_logit_softcapping": 2.0, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "Gemma3": {**_HEAD, **_TYPES, "sliding_window": 12},
    "Gemma4": {
        **_HEAD, **_TYPES, "global_head_dim": 16, "sliding_window": 12, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 200, "hidden_size_per_layer_input": 0,
    },
    "Glm": _HEAD, "Glm4": _HEAD,
    "GptOss": {**_HEAD, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 12}, "Granite": {},
    "Helium": _HEAD, "HunYuanDenseV1": _HEAD, "Llama": {},
    "Llama4": {**_HEAD, "intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 12},
    "Mistral": {"sliding_window": 12}, "Mixtral": {"num_local_experts": 2},
    "ModernBertDecoder": {"local_attention": 12},
    "Nemotron": {}, "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.3}, "Olmo2": {},
    "Olmo3": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}, "Persimmon": {},
    "Phi": {},
    "Phi3": {}, "Qwen2": {}, "Qwen3": _HEAD, "Qwen3Moe": {**_HEAD, **_MOE, "num_experts": 2}, "SeedOss": _HEAD,
    "SmolLM3": {}, "StableLm": {}, "Starcoder2": {"sliding_window": 12},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "DeepseekV2": {**_LATENT, "first_k_dense_replace": 1},
    "DeepseekV3": {**_LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "JetMoe": {"num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 16},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "GPTNeo": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 12,
    },
    "Mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
}  # fmt: skip


def made(name: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = kind(config(**{**_BASE, **values})).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def ids(seed: int, batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(seed))


def small_of(model: Any, **values: Any) -> Any:
    policy = KVPolicy(sinks=2, codebook_size=16, chunk=8, **values)
    return quantize_kv(model, policy, calibration=[ids(9, 4, 48)], fit=False, progress=False).eval()


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_it_is_served(name: str) -> None:
    dense, x = made(name, SERVED[name]), ids(1)
    wanted = dense(x, use_cache=False).logits
    size = float(wanted.abs().max())
    wide = small_of(dense, window=64)
    assert float((wide(x, use_cache=False).logits - wanted).abs().max()) < 1e-4 * size
    small = small_of(dense, window=8)
    whole = small(x, use_cache=False).logits
    for sizes in ([20] + [1] * 20, [20, 20], [7, 13, 20]):
        assert float((in_parts(small, x, sizes) - whole).abs().max()) < 1e-3 * size


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_is_fitted(name: str) -> None:
    with pytest.raises(RewriteError):
        small_of(made(name, REFUSED[name]), window=8)
