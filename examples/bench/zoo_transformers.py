"""transformers: one or two models of each type, from tiny configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_models import Call, Model, tokens

_VOCAB = 128
_LM = {
    "vocab_size": _VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MHA = {**_LM, "num_key_value_heads": 4}
_GPT = {
    "vocab_size": _VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128, "n_ctx": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_BART = {
    "vocab_size": _VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": _VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_labels": 16, "num_channels": 3,
}  # fmt: skip
_SPEECH = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32,
    "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip

# Decoders: model type, what its configuration has besides or in place of the usual.
_DECODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", _LM),
    ("mistral", {**_LM, "sliding_window": 8}),
    ("gemma", {**_LM, "head_dim": 16}),
    ("gemma2", {**_LM, "head_dim": 16, "sliding_window": 8}),
    ("gemma3_text", {**_LM, "head_dim": 16, "sliding_window": 8}),
    ("qwen2", _LM),
    ("qwen3", {**_LM, "head_dim": 16}),
    ("phi", _LM),
    ("phi3", _LM),
    ("olmo", _LM),
    ("olmo2", _LM),
    ("olmo3", _LM),
    ("stablelm", _LM),
    ("starcoder2", _LM),
    ("granite", _LM),
    ("glm", {**_LM, "head_dim": 16}),
    ("glm4", {**_LM, "head_dim": 16}),
    ("cohere", _LM),
    ("cohere2", _LM),
    ("nemotron", _LM),
    ("persimmon", _MHA),
    ("helium", {**_LM, "head_dim": 16}),
    ("smollm3", _LM),
    ("exaone4", _LM),
    ("seed_oss", {**_LM, "head_dim": 16}),
    ("arcee", _LM),
    ("apertus", _LM),
    ("diffllama", _LM),
    ("bitnet", _LM),
    ("ministral", {**_LM, "head_dim": 16}),
    ("nanochat", _LM),
    ("doge", _LM),
    ("vaultgemma", {**_LM, "head_dim": 16}),
    ("modernbert-decoder", {**_MHA, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    ("gpt2", _GPT),
    ("openai-gpt", _GPT),
    ("gpt_bigcode", _GPT),
    ("gptj", {**_GPT, "rotary_dim": 8}),
    ("codegen", {**_GPT, "rotary_dim": 8}),
    ("gpt_neo", {**_MHA, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}),
    ("gpt_neox", _MHA),
    ("gpt_neox_japanese", {**_MHA, "intermediate_multiple_size": 2}),
    ("bloom", {"vocab_size": _VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    ("falcon", {**_MHA, "ffn_hidden_size": 128}),
    ("mpt", {"vocab_size": _VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    ("opt", {**_MHA, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    ("xglm", {"vocab_size": _VOCAB, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}),
    ("biogpt", _MHA),
    ("ctrl", {"vocab_size": _VOCAB, "n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    ("mixtral", {**_LM, **_MOE}),
    ("qwen2_moe", {**_LM, **_MOE, "shared_expert_intermediate_size": 64}),
    ("qwen3_moe", {**_LM, **_MOE, "head_dim": 16}),
    ("olmoe", {**_LM, **_MOE}),
    ("granitemoe", {**_LM, **_MOE}),
    ("granitemoeshared", {**_LM, **_MOE, "shared_intermediate_size": 64}),
    ("phimoe", {**_LM, **_MOE}),
    ("gpt_oss", {**_LM, **_MOE, "head_dim": 16, "sliding_window": 8}),
    ("llama4_text", {**_LM, **_MOE, "head_dim": 16, "intermediate_size_mlp": 128, "attention_chunk_size": 8}),
    ("dbrx", {"vocab_size": _VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
              "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
              "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}}),
    ("deepseek_v2", {**_MHA, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
                     "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    ("deepseek_v3", {**_MHA, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
                     "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    ("glm4_moe", {**_LM, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    ("ernie4_5", {**_LM, "head_dim": 16}),
    ("ernie4_5_moe", {**_LM, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1}),
    ("flex_olmo", {**_LM, **_MOE}),
    ("minimax", {**_LM, **_MOE, "head_dim": 16, "block_size": 8}),
    ("hunyuan_v1_moe", {**_LM, "head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    ("hunyuan_v1_dense", {**_LM, "head_dim": 16}),
    ("dots1", {**_LM, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    ("jetmoe", {**_LM, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}),
    ("longcat_flash", {**_MHA, "ffn_hidden_size": 128, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                       "head_dim": 8, "v_head_dim": 16, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 64, "num_layers": 1}),
    ("jamba", {**_LM, "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8,
               "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}),
    ("bamba", {**_LM, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8}),
    ("granitemoehybrid", {**_LM, **_MOE, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8, "shared_intermediate_size": 64}),
    ("falcon_h1", {**_LM, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8}),
    ("zamba2", {**_LM, "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 8, "attention_head_dim": 32, "attention_hidden_size": 128}),
    ("mamba", {"vocab_size": _VOCAB, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}),
    ("mamba2", {"vocab_size": _VOCAB, "hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    ("falcon_mamba", {"vocab_size": _VOCAB, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}),
    ("rwkv", {"vocab_size": _VOCAB, "hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "context_length": 64}),
    ("xlstm", {"vocab_size": _VOCAB, "hidden_size": 64, "num_blocks": 2, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 8}),
    ("recurrent_gemma", {**_LM, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8, "head_dim": 16}),
    ("qwen3_next", {**_LM, **_MOE, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                    "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 64}),
    ("lfm2", {**_LM, "layer_types": ["conv", "full_attention"], "block_ff_dim": 128}),
    ("lfm2_moe", {**_LM, **_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    ("reformer", {"vocab_size": _VOCAB, "hidden_size": 64, "attention_head_size": 16, "num_attention_heads": 4, "feed_forward_size": 128, "attn_layers": ["local", "lsh"],
                  "axial_pos_shape": (2, 6), "axial_pos_embds_dim": (32, 32), "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "is_decoder": True, "max_position_embeddings": 64}),
    ("xlnet", {"vocab_size": _VOCAB, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}),
    ("prophetnet", {"vocab_size": _VOCAB, "hidden_size": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_encoder_layers": 2, "num_decoder_layers": 2,
                    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "add_cross_attention": False, "is_decoder": True}),
    ("trocr", {"vocab_size": _VOCAB, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128, "max_position_embeddings": 64}),
)  # fmt: skip

_ENCODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bert", _MHA),
    ("roberta", _MHA),
    ("albert", {**_MHA, "embedding_size": 64}),
    ("distilbert", {"vocab_size": _VOCAB, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64}),
    ("electra", {**_MHA, "embedding_size": 64}),
    ("deberta", {**_MHA, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("deberta-v2", {**_MHA, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu"}),
    ("convbert", {**_MHA, "embedding_size": 64, "conv_kernel_size": 3}),
    ("mpnet", _MHA),
    ("funnel", {"vocab_size": _VOCAB, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128}),
    ("fnet", {**_MHA, "use_tpu_fourier_optimizations": False}),
    ("nystromformer", {**_MHA, "num_landmarks": 4, "segment_means_seq_len": 12}),
    ("yoso", {**_MHA, "use_expectation": True}),
    ("mra", {**_MHA, "block_per_row": 2}),
    ("big_bird", {**_MHA, "attention_type": "original_full"}),
    ("longformer", {**_MHA, "attention_window": 4}),
    ("mobilebert", {**_MHA, "embedding_size": 64, "intra_bottleneck_size": 64, "true_hidden_size": 64}),
    ("squeezebert", {**_MHA, "embedding_size": 64}),
    ("roformer", {**_MHA, "embedding_size": 64}),
    ("rembert", {**_MHA, "input_embedding_size": 64, "output_embedding_size": 64}),
    ("xlm", {"vocab_size": _VOCAB, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    ("flaubert", {"vocab_size": _VOCAB, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    ("xlm-roberta-xl", _MHA),
    ("roberta-prelayernorm", _MHA),
    ("ibert", _MHA),
    ("esm", {**_MHA, "position_embedding_type": "rotary", "mask_token_id": 5}),
    ("megatron-bert", _MHA),
    ("ernie", _MHA),
    ("modernbert", {**_MHA, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    ("camembert", _MHA),
    ("data2vec-text", _MHA),
    ("xmod", {**_MHA, "languages": ["en_XX"], "default_language": "en_XX"}),
    ("luke", {**_MHA, "entity_vocab_size": 16, "entity_emb_size": 64}),
    ("layoutlm", _MHA),
    ("eurobert", _LM),
    ("perceiver", {"vocab_size": _VOCAB, "num_latents": 8, "d_latents": 64, "d_model": 64, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                   "num_cross_attention_heads": 4, "max_position_embeddings": 12, "qk_channels": 64, "v_channels": 64}),
)  # fmt: skip

_BOTH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bart", _BART),
    ("mbart", _BART),
    ("pegasus", _BART),
    ("marian", _BART),
    ("m2m_100", _BART),
    ("plbart", _BART),
    ("mvp", _BART),
    ("blenderbot", _BART),
    ("blenderbot-small", _BART),
    ("bigbird_pegasus", {**_BART, "attention_type": "original_full"}),
    ("pegasus_x", {**_BART, "block_size": 4, "num_global_tokens": 4}),
    ("led", {**_BART, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4}),
    ("t5", _T5),
    ("mt5", _T5),
    ("umt5", _T5),
    ("switch_transformers", {**_T5, "num_experts": 4, "expert_capacity": 8, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    ("longt5", {**_T5, "local_radius": 4, "global_block_size": 4, "encoder_attention_type": "transient-global"}),
    ("nllb-moe", {**_BART, "num_experts": 4, "expert_capacity": 8, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    ("fsmt", {**{k: v for k, v in _BART.items() if k != "vocab_size"}, "langs": ["en", "de"], "src_vocab_size": _VOCAB, "tgt_vocab_size": _VOCAB}),
    ("prophetnet", {"vocab_size": _VOCAB, "hidden_size": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_encoder_layers": 2, "num_decoder_layers": 2,
                    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 64}),
)  # fmt: skip

_PYRAMID = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "patch_size": 4, "num_labels": 16, "window_size": 4}
_STAGES = {"hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 16, "num_channels": 3, "num_stages": 2}
_IMAGES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("vit", "ImageClassification", 32, _VISION),
    ("deit", "", 32, _VISION),
    ("beit", "ImageClassification", 32, {**_VISION, "use_relative_position_bias": True}),
    ("data2vec-vision", "ImageClassification", 32, {**_VISION, "use_relative_position_bias": True}),
    ("dinov2", "ImageClassification", 32, {**_VISION, "mlp_ratio": 2}),
    ("dinov2_with_registers", "ImageClassification", 32, {**_VISION, "mlp_ratio": 2}),
    ("dinov3_vit", "", 32, _VISION),
    ("ijepa", "ImageClassification", 32, _VISION),
    ("vit_msn", "ImageClassification", 32, _VISION),
    ("vit_mae", "", 32, {**_VISION, "mask_ratio": 0.5}),
    ("vitdet", "", 32, {**_VISION, "mlp_ratio": 2, "pretrain_image_size": 32, "window_block_indices": [0], "window_size": 2, "use_relative_position_embeddings": True}),
    ("hiera", "ImageClassification", 32, {"embed_dim": 32, "image_size": [32, 32], "patch_stride": [4, 4], "depths": [1, 1], "num_heads": [1, 2], "embed_dim_multiplier": 2.0,
                                          "num_query_pool": 1, "masked_unit_size": [2, 2], "query_stride": [2, 2], "num_labels": 16}),
    ("swin", "ImageClassification", 32, _PYRAMID),
    ("swinv2", "ImageClassification", 32, _PYRAMID),
    ("swin2sr", "", 16, {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "image_size": 16, "window_size": 4}),
    ("donut-swin", "ImageClassification", 32, _PYRAMID),
    ("focalnet", "ImageClassification", 32, {"embed_dim": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "image_size": 32, "num_labels": 16}),
    ("convnext", "ImageClassification", 32, _STAGES),
    ("convnextv2", "ImageClassification", 32, _STAGES),
    ("cvt", "ImageClassification", 32, {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "num_labels": 16}),
    ("resnet", "ImageClassification", 32, {"embedding_size": 32, **_STAGES, "layer_type": "basic"}),
    ("regnet", "ImageClassification", 32, {"embedding_size": 32, "groups_width": 16, **_STAGES}),
    ("bit", "ImageClassification", 32, {"embedding_size": 32, "num_groups": 8, **_STAGES}),
    ("mobilenet_v1", "ImageClassification", 32, {"depth_multiplier": 0.25, "num_labels": 16}),
    ("mobilenet_v2", "ImageClassification", 32, {"depth_multiplier": 0.25, "num_labels": 16}),
    ("mobilevit", "ImageClassification", 64, {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 128], "num_attention_heads": 4, "image_size": 64, "num_labels": 16}),
    ("mobilevitv2", "ImageClassification", 64, {"width_multiplier": 0.25, "image_size": 64, "num_labels": 16}),
    ("efficientnet", "ImageClassification", 32, {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "num_labels": 16}),
    ("poolformer", "ImageClassification", 32, {"hidden_sizes": [32, 64], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1], "num_labels": 16}),
    ("pvt", "ImageClassification", 64, {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2], "image_size": 64, "num_labels": 16}),
    ("pvt_v2", "ImageClassification", 64, {"hidden_sizes": [32, 64], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [4, 2], "patch_sizes": [7, 3], "strides": [4, 2],
                                           "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "image_size": 64, "num_labels": 16}),
    ("levit", "", 64, {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8], "image_size": 64, "num_labels": 16,
                                          "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]]}),
    ("swiftformer", "ImageClassification", 64, {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [24, 32, 48, 64], "num_labels": 16}),
    ("segformer", "SemanticSegmentation", 64, {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 64, "num_labels": 16}),
    ("glpn", "DepthEstimation", 64, {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 32}),
    ("dpt", "DepthEstimation", 32, {**_VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 32, 48, 64], "fusion_hidden_size": 32, "is_hybrid": False}),
    ("yolos", "ObjectDetection", 32, {**_VISION, "image_size": [32, 32], "num_detection_tokens": 4}),
    ("sam_vision_model", "", 64, {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "mlp_dim": 128, "output_channels": 32,
                                  "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 32}),
    ("siglip_vision_model", "", 32, _VISION),
    ("clip_vision_model", "", 32, _VISION),
    ("mlcd_vision_model", "", 32, {**_VISION, "num_key_value_groups": 1}),
    ("aimv2_vision_model", "", 32, {**_VISION, "is_native": True}),
    ("textnet", "ImageClassification", 64, {"num_labels": 16}),
    ("hgnet_v2", "ImageClassification", 64, {"num_labels": 16, "stem_channels": [3, 16, 16], "stage_in_channels": [16, 64], "stage_mid_channels": [32, 32], "stage_out_channels": [64, 128],
                                             "stage_num_blocks": [1, 1], "stage_downsample": [False, True], "stage_light_block": [False, True], "stage_kernel_size": [3, 5], "stage_numb_of_layers": [2, 2],
                                             "embedding_size": 16, "hidden_sizes": [64, 128], "depths": [1, 1]}),
)  # fmt: skip


def models() -> list[Model]:
    """The entries."""
    from zoo_transformers_more import others

    found = [_entry(name, "CausalLM", options, _ids) for name, options in _DECODERS]
    found += [_entry(name, "MaskedLM", options, _ids) for name, options in _ENCODERS]
    found += [_entry(name, "Seq2SeqLM", options, _two) for name, options in _BOTH]
    for name, task, size, options in _IMAGES:
        found.append(_entry(name, task, options, _pixels(size)))
    return [*found, *others()]


def _entry(name: str, task: str, options: dict[str, Any], call: Callable[[], Call]) -> Model:
    suffix = " seq2seq" if (name, task) in (("prophetnet", "Seq2SeqLM"),) else ""
    return Model(f"transformers/{name}{suffix}", name, auto(name, task, options), call)


def auto(name: str, task: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """A model by its type: ``AutoModel``, or ``AutoModelFor`` a task."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
        config = transformers.AutoConfig.for_model(name, **options)
        config.use_cache = False
        return kind.from_config(config)

    return build


def _ids() -> Call:
    return Call((), {"input_ids": tokens(_VOCAB)})


def _two() -> Call:
    return Call((), {"input_ids": tokens(_VOCAB), "decoder_input_ids": tokens(_VOCAB, 7)})


def _pixels(size: int) -> Callable[[], Call]:
    return lambda: Call((), {"pixel_values": torch.randn(2, 3, size, size)})
