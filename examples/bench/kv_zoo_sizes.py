"""Small sizes of configurations of transformers, by the names of their fields and by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_VOCABULARY = 200

# What a field of a configuration is wherever there is one of that name.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input"), _VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim"), 64),
    **dict.fromkeys((
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "dff", "d_inner",
        "ffn_hidden_size", "intermediate_size_mlp", "dim_ff", "feed_forward_size", "block_ff_dim",
    ), 96),
    **dict.fromkeys((
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_encoder_layers",
    ), 2),
    **dict.fromkeys((
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
    ), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "dim_head", "attention_head_size"), 16),
    "num_key_value_heads": 2,
    **dict.fromkeys((
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_encoder_position_embeddings",
        "max_decoder_position_embeddings", "max_target_positions",
    ), 128),
    **dict.fromkeys((
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    ), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys((
        "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    ), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "first_k_dense_replace": 1,
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size", "local_attention"), 12),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "mamba_dt_rank": 8, "chunk_size": 8, "state_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 64,
    "image_size": 32, "patch_size": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip

# What several model types have besides, or in the place of these.
_SHARED: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa",
      "minicpm3", "sarvam_mla", "youtu", "longcat_flash"), {"head_dim": 8, "num_key_value_heads": 4}),
    (("codegen", "gptj"), {"rotary_dim": 8}),
    (("bamba", "jamba"), {"attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1,
                          "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False}),
    (("qwen3_5_text", "qwen3_5_moe_text", "lfm3"), {"num_hidden_layers": 4}),
    (("kimi_linear", "bailing_hybrid"),
     {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4}),
    (("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"]}),
    (("gemma3n_text", "gemma4_text"), {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                                       "layer_types": ["sliding_attention", "full_attention"] * 2}),
    (("bert", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roberta-prelayernorm", "roc_bert",
      "xlm-roberta", "xlm-roberta-xl", "megatron-bert", "rembert", "roformer", "big_bird", "bert-generation",
      "reformer", "xmod"),
     {"is_decoder": True}),
    (("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano"), {"decoder_start_token_id": 0}),
)  # fmt: skip

# What one has.
_OWN: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
    "dory": {"sliding_window": 64},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "fsmt": {"langs": ["en", "de"]},
    "gemma4_text": {"global_head_dim": 16, "hidden_size_per_layer_input": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "led": {"attention_window": 4},
    "lfm2_moe": {"num_dense_layers": 1},
    "longt5": {"local_radius": 4, "global_block_size": 4},
    "mamba2": {"num_heads": 8},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 12},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": (4, 6), "axial_pos_embds_dim": (32, 32),
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
    "whisper": {"num_mel_bins": 16, "max_source_positions": 20},
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["mamba", "mamba", "hybrid"], "attention_head_dim": 32,
              "attention_hidden_size": 128, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "layer_types": ["mamba", "hybrid"], "mamba_headdim": 16,
               "mamba_ngroups": 1, "n_mamba_heads": 8, "num_mem_blocks": 1, "adapter_rank": 8, "attention_head_dim": 32,
               "attention_hidden_size": 128},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Both.
OPTIONS: dict[str, dict[str, Any]] = dict(_OWN)
for _kinds, _values in _SHARED:
    for _kind in _kinds:
        OPTIONS[_kind] = {**_values, **OPTIONS.get(_kind, {})}


def _sound(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(7))


# Inputs of encoders that are not tokens: the batch to keyword arguments.
ENCODED: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "whisper": lambda batch: {"input_features": _sound(16, 40).repeat(batch, 1, 1)},
    "speech_to_text": lambda batch: {"input_features": _sound(40, 16).repeat(batch, 1, 1)},
}
