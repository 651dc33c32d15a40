"""transformers: speech, sounds and time series."""

from __future__ import annotations

import torch
from zoo_models import Model
from zoo_tiny import SPEECH, VOCAB, auto, entry, ids, keywords

_IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def models() -> list[Model]:
    """The entries."""
    return [*_speech(), *_series()]


def _speech() -> list[Model]:
    wave = keywords(input_values=lambda: torch.randn(2, 800))
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
        options = {**SPEECH, **more}
        found.append(entry(name, auto(name, "", options), wave, grad_inputs=False))  # they set requires_grad
    tall = keywords(input_features=lambda: torch.randn(2, 20, 16))
    bart = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": VOCAB, "pad_token_id": 0,
                "decoder_start_token_id": 2,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    heard = keywords(input_features=lambda: torch.randn(2, 16, 40), decoder_input_ids=ids(7))
    read = keywords(input_features=lambda: torch.randn(2, 40, 16), decoder_input_ids=ids(7))
    whisper = {**bart, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    s2t = {
        **bart,
        "input_feat_per_channel": 16,
        "conv_channels": 32,
        "max_source_positions": 64,
        "max_target_positions": 32,
    }
    return [
        *found,
        entry("whisper", auto("whisper", "SpeechSeq2Seq", whisper), heard),
        entry("speech_to_text", auto("speech_to_text", "SpeechSeq2Seq", s2t), read),
        entry(
            "wav2vec2-bert",
            auto("wav2vec2-bert", "", {**SPEECH, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}),
            tall,
        ),
        entry(
            "audio-spectrogram-transformer",
            auto("audio-spectrogram-transformer", "", {**_IMAGE, "num_mel_bins": 16, "max_length": 32, "patch_size": 8,
                                                             "frequency_stride": 8, "time_stride": 8}),
            keywords(input_values=lambda: torch.randn(2, 32, 16)),
        ),
        entry(
            "encodec",
            auto("encodec", "", {"num_filters": 8, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 16,
                "upsampling_ratios": [4, 2], "num_lstm_layers": 1}),
            keywords(input_values=lambda: torch.randn(1, 1, 400)),
        ),
        entry(
            "univnet",
            auto("univnet", "", {"model_in_channels": 16, "model_hidden_channels": 16, "num_mel_bins": 16,
                "kernel_predictor_hidden_channels": 16,
                                       "resblock_stride_sizes": [2, 2, 2]}),
            keywords(input_features=lambda: torch.randn(1, 6, 16), noise_sequence=lambda: torch.randn(1, 6, 16)),
        ),
        entry(
            "vits",
            auto("vits", "", {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "ffn_dim": 64, "flow_size": 32,
                                    "spectrogram_bins": 17, "upsample_initial_channel": 32, "upsample_rates": [4, 2],
                                        "upsample_kernel_sizes": [8, 4],
                                    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
                                        "prior_encoder_num_wavenet_layers": 2,
                                    "posterior_encoder_num_wavenet_layers": 2, "prior_encoder_num_flows": 2,
                                        "duration_predictor_num_flows": 2,
                                    "duration_predictor_filter_channels": 32}),
            keywords(input_ids=ids(6, 40)),
        ),
    ]  # fmt: skip


def _series() -> list[Model]:
    patches = {"num_input_channels": 4, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 64,
        "num_hidden_layers": 2,
               "num_attention_heads": 4, "ffn_dim": 128, "prediction_length": 8, "num_layers": 2}  # fmt: skip
    past = keywords(past_values=lambda: torch.randn(2, 32, 4))
    forecast = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 2,
        "d_model": 64, "encoder_layers": 2,
                "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
    timed = keywords(
        past_values=lambda: torch.rand(2, 19), past_time_features=lambda: torch.randn(2, 19, 2),
        past_observed_mask=lambda: torch.ones(2, 19), future_values=lambda: torch.rand(2, 8),
        future_time_features=lambda: torch.randn(2, 8, 2),
    )  # fmt: skip
    decisions = keywords(
        states=lambda: torch.randn(2, 6, 17), actions=lambda: torch.randn(2, 6, 4), rewards=lambda: torch.randn(2, 6,
            1),
        returns_to_go=lambda: torch.randn(2, 6, 1), timesteps=lambda: torch.arange(6).expand(2, 6),
        attention_mask=lambda: torch.ones(2, 6),
    )  # fmt: skip
    return [
        entry("patchtst", auto("patchtst", "", patches), past),
        entry("patchtsmixer", auto("patchtsmixer", "", patches), past),
        entry("time_series_transformer", auto("time_series_transformer", "", forecast), timed),
        entry("informer", auto("informer", "", {**forecast, "sampling_factor": 2}), timed),
        entry("autoformer", auto("autoformer", "", {**forecast, "moving_average": 5}), timed),
        entry(
            "decision_transformer",
            auto("decision_transformer", "", {"state_dim": 17, "act_dim": 4, "hidden_size": 64, "n_layer": 2,
                "n_head": 4, "n_inner": 128, "n_positions": 64}),
            decisions,
        ),
    ]  # fmt: skip
