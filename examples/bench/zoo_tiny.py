"""Tiny configurations that the transformers entries share, and how a model is made of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_models import Call, Model, tokens

VOCAB = 128
LM = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {**LM, "num_key_value_heads": 4}
GPT = {
    "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128, "n_ctx": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
BART = {
    "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_labels": 16, "num_channels": 3,
}  # fmt: skip
SPEECH = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32,
    "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip


def auto(name: str, task: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """A model by its type: ``AutoModel``, or ``AutoModelFor`` a task."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
        config = transformers.AutoConfig.for_model(name, **options)
        config.use_cache = False
        return kind.from_config(config)

    return build


def entry(name: str, build: Callable[[], nn.Module], call: Callable[[], Call], **more: Any) -> Model:
    return Model(f"transformers/{name}", name, build, call, **more)


def keywords(**make: Callable[[], Any]) -> Callable[[], Call]:
    return lambda: Call((), {name: made() for name, made in make.items()})


def pixels(size: int = 32) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def ids(length: int = 12, vocab: int = VOCAB) -> Callable[[], torch.Tensor]:
    return lambda: tokens(vocab, length)
