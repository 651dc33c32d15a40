"""transformers: detection, and models of more than one kind of input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_models import Call, Model, tokens
from zoo_tiny import GPT, LM, VOCAB, auto, entry, ids, keywords, pixels

_TEXT = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_DETR = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
         "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 5, "num_labels": 8}  # fmt: skip


def models() -> list[Model]:
    """The entries."""
    return [*_pairs(), *_detectors(), *_languages_with_images()]


def _pairs() -> list[Model]:
    both = keywords(input_ids=ids(), pixel_values=pixels())
    found = []
    for name, more in (
        ("clip", {"projection_dim": 64}),
        ("siglip", {}),
        ("altclip", {"projection_dim": 64}),
        ("chinese_clip", {"projection_dim": 64}),
        ("clipseg", {"projection_dim": 64}),
        ("metaclip_2", {"projection_dim": 64}),
        ("owlvit", {"projection_dim": 64}),
        ("blip", {"projection_dim": 64, "image_text_hidden_size": 64}),
        ("groupvit", {"projection_dim": 64, "projection_intermediate_dim": 64}),
        (
            "bridgetower",
            {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128},
        ),
    ):
        text = {**_TEXT, "project_dim": 64, "encoder_hidden_size": 64}
        vision = (
            {**_IMAGE, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]}
            if name == "groupvit"
            else _IMAGE
        )
        found.append(entry(name, auto(name, "", {"text_config": text, "vision_config": vision, **more}), both))
    vilt = {**_TEXT, **_IMAGE, "modality_type_vocab_size": 2}
    seen = keywords(input_ids=ids(), visual_feats=lambda: torch.randn(2, 5, 32), visual_pos=lambda: torch.rand(2, 5, 4))
    lxmert = {**_TEXT, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 32}
    regions = keywords(input_ids=ids(), visual_embeds=lambda: torch.randn(2, 5, 32))
    boxes = keywords(input_ids=ids(), bbox=lambda: torch.randint(0, 50, (2, 12, 2)).repeat(1, 1, 2))
    laid = keywords(
        input_ids=ids(), bbox=lambda: torch.randint(0, 50, (2, 12, 2)).repeat(1, 1, 2), pixel_values=pixels()
    )
    layout = {
        **_TEXT,
        "max_2d_position_embeddings": 64,
        "coordinate_size": 8,
        "shape_size": 16,
        "input_size": 32,
        "patch_size": 8,
    }
    clap = {
        "text_config": _TEXT,
        "projection_dim": 64,
        "audio_config": {
            "patch_embeds_hidden_size": 32,
            "depths": [1, 1],
            "num_attention_heads": [2, 4],
            "spec_size": 64,
            "num_mel_bins": 16,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "window_size": 4,
            "hidden_size": 64,
            "num_classes": 8,
        },
    }
    return [
        *found,
        entry("vilt", auto("vilt", "", vilt), both),
        entry("lxmert", auto("lxmert", "", lxmert), seen),
        entry("visual_bert", auto("visual_bert", "", {**_TEXT, "visual_embedding_dim": 32}), regions),
        entry("lilt", auto("lilt", "", {**_TEXT, "hidden_size": 96, "channel_shrink_ratio": 4,
            "max_2d_position_embeddings": 64}), boxes),
        entry("bros", auto("bros", "", _TEXT), keywords(input_ids=ids(), bbox=lambda: torch.rand(2, 12, 8))),
        entry("layoutlmv3", auto("layoutlmv3", "", layout), laid),
        entry("canine", auto("canine", "", {**_TEXT, "num_hash_buckets": 64, "downsampling_rate": 4,
            "local_transformer_stride": 8}), keywords(input_ids=ids(16))),
        entry("tapas", auto("tapas", "", {**_TEXT, "type_vocab_sizes": [3, 16, 16, 2, 16, 16, 10]}),
            keywords(input_ids=ids())),
        entry(
            "clap", auto("clap", "", clap),
            keywords(input_ids=ids(), input_features=lambda: torch.randn(2, 1, 64, 16)),
        ),
    ]  # fmt: skip


def _backbone(kind: str = "resnet") -> dict[str, Any]:
    return {"model_type": kind, "embedding_size": 16, "hidden_sizes": [16, 24, 32, 64], "depths": [1, 1, 1, 1],
        "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip


def _configured(name: str, kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A model whose configuration holds another model's."""

    def build() -> nn.Module:
        import transformers

        def made(value: Any) -> Any:
            if isinstance(value, dict) and "model_type" in value:
                rest = {key: item for key, item in value.items() if key != "model_type"}
                return transformers.AutoConfig.for_model(value["model_type"], **rest)
            return value

        config = transformers.AutoConfig.for_model(name, **{key: made(value) for key, value in options.items()})
        config.use_cache = False
        return getattr(transformers, kind)(config)

    return build


def _detectors() -> list[Model]:
    picture = keywords(pixel_values=pixels(64))
    last = {**_backbone(), "out_features": ["stage4"]}
    plain = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    swin = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4],
        "image_size": 64, "patch_size": 4, "window_size": 2,
            "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
    rt = {"encoder_hidden_dim": 32, "encoder_in_channels": [24, 32, 64], "encoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "d_model": 32, "num_queries": 5,
          "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 64, "decoder_layers": 2,
              "decoder_attention_heads": 4, "num_denoising": 0,
          "backbone": None, "use_pretrained_backbone": False, "num_labels": 8, "feat_strides": [8, 16, 32]}  # fmt: skip
    return [
        entry("detr", _configured("detr", "DetrForObjectDetection", backbone_config=last, **plain, **_DETR), picture),
        entry(
            "conditional_detr",
            _configured("conditional_detr", "ConditionalDetrForObjectDetection", backbone_config=last, **plain,
                **_DETR), picture,
        ),
        entry("dab-detr", _configured("dab-detr", "DabDetrForObjectDetection", backbone_config=last, **plain,
            **{k: v for k, v in _DETR.items() if k != "d_model"}, hidden_size=64), picture),
        entry(
            "deformable_detr",
            _configured("deformable_detr", "DeformableDetrForObjectDetection", backbone_config=_backbone(),
                num_feature_levels=3, **plain, **_DETR),
            picture,
        ),
        entry("table-transformer", _configured("table-transformer", "TableTransformerForObjectDetection",
            backbone_config=last, **plain, **_DETR), picture),
        entry("rt_detr", _configured("rt_detr", "RTDetrForObjectDetection",
            backbone_config=_backbone("rt_detr_resnet"), **rt), picture),
        entry("upernet", _configured("upernet", "UperNetForSemanticSegmentation", backbone_config=swin,
            hidden_size=32, num_labels=8, auxiliary_in_channels=64, auxiliary_channels=16), picture),
        entry("superpoint", auto("superpoint", "KeypointDetection", {"encoder_hidden_sizes": [16, 16, 32, 32],
            "decoder_hidden_size": 64, "descriptor_decoder_dim": 64}), picture),
    ]  # fmt: skip


def _languages_with_images() -> list[Model]:
    text = {**LM, "model_type": "llama", "vocab_size": VOCAB}
    vision = {"model_type": "clip_vision_model", **_IMAGE}

    def seen(image: int, count: int, extra: dict[str, Any] | None = None) -> Callable[[], Call]:
        def call() -> Call:
            ids = tokens(VOCAB - 8, 8 + count)
            ids[:, 2 : 2 + count] = image
            return Call((), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), **(extra or {})})

        return call

    sam = {"vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 8, "mlp_dim": 128, "output_channels": 32,
                             "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16},
           "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
           "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                                   "iou_head_hidden_dim": 64}}  # fmt: skip
    git = {**_TEXT, "vision_config": _IMAGE}
    blip2 = {"vision_config": _IMAGE, "qformer_config": {**_TEXT, "encoder_hidden_size": 64,
        "cross_attention_frequency": 1},
             "text_config": {"model_type": "opt", **_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
             "num_query_tokens": 4, "image_token_index": 120}  # fmt: skip
    video = {
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 4,
        "tubelet_size": 2,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    return [
        entry("llava", _configured("llava", "LlavaForConditionalGeneration", text_config=text, vision_config=vision,
            image_token_index=120, image_token_id=120), seen(120, 16)),
        entry("vipllava", _configured("vipllava", "VipLlavaForConditionalGeneration", text_config=text,
            vision_config=vision, image_token_index=120, image_token_id=120,
                                       vision_feature_layers=[-1, -2]), seen(120, 16)),
        entry(
            "paligemma",
            _configured("paligemma", "PaliGemmaForConditionalGeneration", text_config={**LM, "model_type": "gemma",
                "head_dim": 16},
                        vision_config={"model_type": "siglip_vision_model", **_IMAGE, "projection_dim": 64},
                            projection_dim=64, image_token_index=120, image_token_id=120),
            seen(120, 16),
        ),
        entry("git", auto("git", "CausalLM", git), keywords(input_ids=ids(), pixel_values=pixels())),
        entry("blip-2", _configured("blip-2", "Blip2ForConditionalGeneration", **blip2), seen(120, 4)),
        entry(
            "sam", auto("sam", "MaskGeneration", sam),
            keywords(pixel_values=lambda: torch.randn(1, 3, 64, 64), input_points=lambda: torch.tensor([[[[20.0,
                30.0]]]])),
        ),
        entry("videomae", auto("videomae", "VideoClassification", {**video, "num_labels": 8}),
            keywords(pixel_values=lambda: torch.randn(1, 4, 3, 32, 32))),
        entry("vivit", auto("vivit", "VideoClassification", {**video, "tubelet_size": [2, 8, 8], "num_labels": 8}),
            keywords(pixel_values=lambda: torch.randn(1, 4, 3, 32, 32))),
        entry("timesformer", auto("timesformer", "VideoClassification", {**video, "num_labels": 8}),
            keywords(pixel_values=lambda: torch.randn(1, 4, 3, 32, 32))),
        entry("pix2struct", auto("pix2struct", "ImageTextToText", {
            "text_config": {"vocab_size": VOCAB, "hidden_size": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
                "num_heads": 4},
            "vision_config": {"hidden_size": 64, "patch_embed_hidden_size": 48, "d_ff": 128, "d_kv": 16,
                "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 16}}),
            keywords(flattened_patches=lambda: torch.cat([torch.arange(1.0, 10).view(1, 9, 1).expand(2, 9, 2),
                torch.randn(2, 9, 48)], -1), decoder_input_ids=ids(7)), grad_inputs=False),
        entry("vision-encoder-decoder", _vision_encoder_decoder, keywords(pixel_values=pixels(),
            decoder_input_ids=ids(7))),
    ]  # fmt: skip


def _vision_encoder_decoder() -> nn.Module:
    import transformers

    encoder = transformers.AutoConfig.for_model("vit", **_IMAGE)
    decoder = transformers.AutoConfig.for_model("gpt2", **GPT, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder.use_cache = False
    return transformers.VisionEncoderDecoderModel(config)
