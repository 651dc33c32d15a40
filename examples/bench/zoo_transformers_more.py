"""transformers: speech, time series, detection, and models of more than one kind of input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zoo_transformers as usual
from torch import nn
from zoo_models import Call, Model, tokens

_VOCAB = 128
_TEXT = {"vocab_size": _VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_IMAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_DETR = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 5, "num_labels": 8}  # fmt: skip


def others() -> list[Model]:
    """The entries."""
    return [*_speech(), *_series(), *_pairs(), *_detectors(), *_languages_with_images()]


def _entry(name: str, build: Callable[[], nn.Module], call: Callable[[], Call], **more: Any) -> Model:
    return Model(f"transformers/{name}", name, build, call, **more)


def _keywords(**make: Callable[[], Any]) -> Callable[[], Call]:
    return lambda: Call((), {name: made() for name, made in make.items()})


def _pixels(size: int = 32) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def _ids(length: int = 12, vocab: int = _VOCAB) -> Callable[[], torch.Tensor]:
    return lambda: tokens(vocab, length)


# ---------------------------------------------------------------------------------------------------------- speech


def _speech() -> list[Model]:
    wave = _keywords(input_values=lambda: torch.randn(2, 800))
    found = []
    for name, more in (
        ("wav2vec2", {}),
        ("hubert", {}),
        ("wavlm", {"num_buckets": 16, "max_bucket_distance": 32}),
        ("unispeech", {}),
        ("unispeech-sat", {}),
        ("data2vec-audio", {"conv_pos_kernel_size": 5}),
        ("wav2vec2-conformer", {"conv_depthwise_kernel_size": 3}),
        ("sew", {"squeeze_factor": 2}),
        ("sew-d", {"squeeze_factor": 1, "pos_att_type": ("p2c", "c2p"), "position_buckets": 8}),
    ):
        options = {**usual._SPEECH, **more}
        found.append(_entry(name, usual.auto(name, "", options), wave, grad_inputs=False))  # they set requires_grad
    tall = _keywords(input_features=lambda: torch.randn(2, 20, 16))
    bart = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": _VOCAB, "pad_token_id": 0, "decoder_start_token_id": 2,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    heard = _keywords(input_features=lambda: torch.randn(2, 16, 40), decoder_input_ids=_ids(7))
    read = _keywords(input_features=lambda: torch.randn(2, 40, 16), decoder_input_ids=_ids(7))
    whisper = {**bart, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    s2t = {**bart, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64, "max_target_positions": 32}
    return [
        *found,
        _entry("whisper", usual.auto("whisper", "SpeechSeq2Seq", whisper), heard),
        _entry("speech_to_text", usual.auto("speech_to_text", "SpeechSeq2Seq", s2t), read),
        _entry(
            "wav2vec2-bert",
            usual.auto("wav2vec2-bert", "", {**usual._SPEECH, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}),
            tall,
        ),
        _entry(
            "audio-spectrogram-transformer",
            usual.auto("audio-spectrogram-transformer", "", {**_IMAGE, "num_mel_bins": 16, "max_length": 32, "patch_size": 8,
                                                             "frequency_stride": 8, "time_stride": 8}),
            _keywords(input_values=lambda: torch.randn(2, 32, 16)),
        ),
        _entry(
            "encodec",
            usual.auto("encodec", "", {"num_filters": 8, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 16, "upsampling_ratios": [4, 2], "num_lstm_layers": 1}),
            _keywords(input_values=lambda: torch.randn(1, 1, 400)),
        ),
        _entry(
            "univnet",
            usual.auto("univnet", "", {"model_in_channels": 16, "model_hidden_channels": 16, "num_mel_bins": 16, "kernel_predictor_hidden_channels": 16,
                                       "resblock_stride_sizes": [2, 2, 2]}),
            _keywords(input_features=lambda: torch.randn(1, 6, 16), noise_sequence=lambda: torch.randn(1, 6, 16)),
        ),
        _entry(
            "vits",
            usual.auto("vits", "", {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64, "flow_size": 32,
                                    "spectrogram_bins": 17, "upsample_initial_channel": 32, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4],
                                    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "prior_encoder_num_wavenet_layers": 2,
                                    "posterior_encoder_num_wavenet_layers": 2, "prior_encoder_num_flows": 2, "duration_predictor_num_flows": 2,
                                    "duration_predictor_filter_channels": 32}),
            _keywords(input_ids=_ids(6, 40)),
        ),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- time series


def _series() -> list[Model]:
    patches = {"num_input_channels": 4, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4, "ffn_dim": 128, "prediction_length": 8, "num_layers": 2}  # fmt: skip
    past = _keywords(past_values=lambda: torch.randn(2, 32, 4))
    forecast = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 2, "d_model": 64, "encoder_layers": 2,
                "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
    timed = _keywords(
        past_values=lambda: torch.rand(2, 19), past_time_features=lambda: torch.randn(2, 19, 2),
        past_observed_mask=lambda: torch.ones(2, 19), future_values=lambda: torch.rand(2, 8),
        future_time_features=lambda: torch.randn(2, 8, 2),
    )  # fmt: skip
    decisions = _keywords(
        states=lambda: torch.randn(2, 6, 17), actions=lambda: torch.randn(2, 6, 4), rewards=lambda: torch.randn(2, 6, 1),
        returns_to_go=lambda: torch.randn(2, 6, 1), timesteps=lambda: torch.arange(6).expand(2, 6),
        attention_mask=lambda: torch.ones(2, 6),
    )  # fmt: skip
    return [
        _entry("patchtst", usual.auto("patchtst", "", patches), past),
        _entry("patchtsmixer", usual.auto("patchtsmixer", "", patches), past),
        _entry("time_series_transformer", usual.auto("time_series_transformer", "", forecast), timed),
        _entry("informer", usual.auto("informer", "", {**forecast, "sampling_factor": 2}), timed),
        _entry("autoformer", usual.auto("autoformer", "", {**forecast, "moving_average": 5}), timed),
        _entry(
            "decision_transformer",
            usual.auto("decision_transformer", "", {"state_dim": 17, "act_dim": 4, "hidden_size": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 64}),
            decisions,
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ images and words


def _pairs() -> list[Model]:
    both = _keywords(input_ids=_ids(), pixel_values=_pixels())
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
        ("bridgetower", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}),
    ):
        text = {**_TEXT, "project_dim": 64, "encoder_hidden_size": 64}
        vision = {**_IMAGE, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]} if name == "groupvit" else _IMAGE
        found.append(_entry(name, usual.auto(name, "", {"text_config": text, "vision_config": vision, **more}), both))
    vilt = {**_TEXT, **_IMAGE, "modality_type_vocab_size": 2}
    seen = _keywords(input_ids=_ids(), visual_feats=lambda: torch.randn(2, 5, 32), visual_pos=lambda: torch.rand(2, 5, 4))
    lxmert = {**_TEXT, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 32}
    regions = _keywords(input_ids=_ids(), visual_embeds=lambda: torch.randn(2, 5, 32))
    boxes = _keywords(input_ids=_ids(), bbox=lambda: torch.randint(0, 50, (2, 12, 2)).repeat(1, 1, 2))
    laid = _keywords(
        input_ids=_ids(), bbox=lambda: torch.randint(0, 50, (2, 12, 2)).repeat(1, 1, 2), pixel_values=_pixels()
    )
    layout = {**_TEXT, "max_2d_position_embeddings": 64, "coordinate_size": 8, "shape_size": 16, "input_size": 32, "patch_size": 8}
    clap = {
        "text_config": _TEXT, "projection_dim": 64,
        "audio_config": {"patch_embeds_hidden_size": 32, "depths": [1, 1], "num_attention_heads": [2, 4], "spec_size": 64, "num_mel_bins": 16, "patch_size": 4,
                         "patch_stride": [4, 4], "window_size": 4, "hidden_size": 64, "num_classes": 8},
    }
    return [
        *found,
        _entry("vilt", usual.auto("vilt", "", vilt), both),
        _entry("lxmert", usual.auto("lxmert", "", lxmert), seen),
        _entry("visual_bert", usual.auto("visual_bert", "", {**_TEXT, "visual_embedding_dim": 32}), regions),
        _entry("lilt", usual.auto("lilt", "", {**_TEXT, "hidden_size": 96, "channel_shrink_ratio": 4, "max_2d_position_embeddings": 64}), boxes),
        _entry("bros", usual.auto("bros", "", _TEXT), _keywords(input_ids=_ids(), bbox=lambda: torch.rand(2, 12, 8))),
        _entry("layoutlmv3", usual.auto("layoutlmv3", "", layout), laid),
        _entry("canine", usual.auto("canine", "", {**_TEXT, "num_hash_buckets": 64, "downsampling_rate": 4, "local_transformer_stride": 8}), _keywords(input_ids=_ids(16))),
        _entry("tapas", usual.auto("tapas", "", {**_TEXT, "type_vocab_sizes": [3, 16, 16, 2, 16, 16, 10]}), _keywords(input_ids=_ids())),
        _entry(
            "clap", usual.auto("clap", "", clap),
            _keywords(input_ids=_ids(), input_features=lambda: torch.randn(2, 1, 64, 16)),
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- detection


def _backbone(kind: str = "resnet") -> dict[str, Any]:
    return {"model_type": kind, "embedding_size": 16, "hidden_sizes": [16, 24, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic",
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
    picture = _keywords(pixel_values=_pixels(64))
    last = {**_backbone(), "out_features": ["stage4"]}
    plain = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    swin = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "image_size": 64, "patch_size": 4, "window_size": 2,
            "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
    rt = {"encoder_hidden_dim": 32, "encoder_in_channels": [24, 32, 64], "encoder_ffn_dim": 64, "encoder_attention_heads": 4, "d_model": 32, "num_queries": 5,
          "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "num_denoising": 0,
          "backbone": None, "use_pretrained_backbone": False, "num_labels": 8, "feat_strides": [8, 16, 32]}  # fmt: skip
    return [
        _entry("detr", _configured("detr", "DetrForObjectDetection", backbone_config=last, **plain, **_DETR), picture),
        _entry(
            "conditional_detr",
            _configured("conditional_detr", "ConditionalDetrForObjectDetection", backbone_config=last, **plain, **_DETR), picture,
        ),
        _entry("dab-detr", _configured("dab-detr", "DabDetrForObjectDetection", backbone_config=last, **plain, **{k: v for k, v in _DETR.items() if k != "d_model"}, hidden_size=64), picture),
        _entry(
            "deformable_detr",
            _configured("deformable_detr", "DeformableDetrForObjectDetection", backbone_config=_backbone(), num_feature_levels=3, **plain, **_DETR),
            picture,
        ),
        _entry("table-transformer", _configured("table-transformer", "TableTransformerForObjectDetection", backbone_config=last, **plain, **_DETR), picture),
        _entry("rt_detr", _configured("rt_detr", "RTDetrForObjectDetection", backbone_config=_backbone("rt_detr_resnet"), **rt), picture),
        _entry("upernet", _configured("upernet", "UperNetForSemanticSegmentation", backbone_config=swin, hidden_size=32, num_labels=8, auxiliary_in_channels=64, auxiliary_channels=16), picture),
        _entry("superpoint", usual.auto("superpoint", "KeypointDetection", {"encoder_hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 64, "descriptor_decoder_dim": 64}), picture),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- language models that see


def _languages_with_images() -> list[Model]:
    text = {**usual._LM, "model_type": "llama", "vocab_size": _VOCAB}
    vision = {"model_type": "clip_vision_model", **_IMAGE}

    def seen(image: int, count: int, extra: dict[str, Any] | None = None) -> Callable[[], Call]:
        def call() -> Call:
            ids = tokens(_VOCAB - 8, 8 + count)
            ids[:, 2 : 2 + count] = image
            return Call((), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), **(extra or {})})

        return call

    sam = {"vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "mlp_dim": 128, "output_channels": 32,
                             "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16},
           "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
           "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "iou_head_hidden_dim": 64}}  # fmt: skip
    git = {**_TEXT, "vision_config": _IMAGE}
    blip2 = {"vision_config": _IMAGE, "qformer_config": {**_TEXT, "encoder_hidden_size": 64, "cross_attention_frequency": 1},
             "text_config": {"model_type": "opt", **_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}, "num_query_tokens": 4, "image_token_index": 120}  # fmt: skip
    video = {"image_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return [
        _entry("llava", _configured("llava", "LlavaForConditionalGeneration", text_config=text, vision_config=vision, image_token_index=120, image_token_id=120), seen(120, 16)),
        _entry("vipllava", _configured("vipllava", "VipLlavaForConditionalGeneration", text_config=text, vision_config=vision, image_token_index=120, image_token_id=120,
                                       vision_feature_layers=[-1, -2]), seen(120, 16)),
        _entry(
            "paligemma",
            _configured("paligemma", "PaliGemmaForConditionalGeneration", text_config={**usual._LM, "model_type": "gemma", "head_dim": 16},
                        vision_config={"model_type": "siglip_vision_model", **_IMAGE, "projection_dim": 64}, projection_dim=64, image_token_index=120, image_token_id=120),
            seen(120, 16),
        ),
        _entry("git", usual.auto("git", "CausalLM", git), _keywords(input_ids=_ids(), pixel_values=_pixels())),
        _entry("blip-2", _configured("blip-2", "Blip2ForConditionalGeneration", **blip2), seen(120, 4)),
        _entry(
            "sam", usual.auto("sam", "MaskGeneration", sam),
            _keywords(pixel_values=lambda: torch.randn(1, 3, 64, 64), input_points=lambda: torch.tensor([[[[20.0, 30.0]]]])),
        ),
        _entry("videomae", usual.auto("videomae", "VideoClassification", {**video, "num_labels": 8}), _keywords(pixel_values=lambda: torch.randn(1, 4, 3, 32, 32))),
        _entry("vivit", usual.auto("vivit", "VideoClassification", {**video, "tubelet_size": [2, 8, 8], "num_labels": 8}), _keywords(pixel_values=lambda: torch.randn(1, 4, 3, 32, 32))),
        _entry("timesformer", usual.auto("timesformer", "VideoClassification", {**video, "num_labels": 8}), _keywords(pixel_values=lambda: torch.randn(1, 4, 3, 32, 32))),
        _entry("pix2struct", usual.auto("pix2struct", "ImageTextToText", {
            "text_config": {"vocab_size": _VOCAB, "hidden_size": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
            "vision_config": {"hidden_size": 64, "patch_embed_hidden_size": 48, "d_ff": 128, "d_kv": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 16}}),
            _keywords(flattened_patches=lambda: torch.cat([torch.arange(1.0, 10).view(1, 9, 1).expand(2, 9, 2), torch.randn(2, 9, 48)], -1), decoder_input_ids=_ids(7)), grad_inputs=False),
        _entry("vision-encoder-decoder", _vision_encoder_decoder, _keywords(pixel_values=_pixels(), decoder_input_ids=_ids(7))),
    ]  # fmt: skip


def _vision_encoder_decoder() -> nn.Module:
    import transformers

    encoder = transformers.AutoConfig.for_model("vit", **_IMAGE)
    decoder = transformers.AutoConfig.for_model("gpt2", **usual._GPT, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder.use_cache = False
    return transformers.VisionEncoderDecoderModel(config)
