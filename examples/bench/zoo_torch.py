"""torch.nn: its layers, and models with raw Parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zoo_layers as layers
import zoo_raw as raw
from torch import nn
from torch.nn.utils import parametrizations, prune
from zoo_models import Call, Model, floats, images, tokens

_SEQUENCE = floats((2, 10, 64))


def models() -> list[Model]:
    """The entries."""
    return [*_transformers(), *_recurrent(), *_convolutions(), *_normalised(), *_raw(), *_lookups()]


def _entry(name: str, architecture: str, build: Callable[[], nn.Module], call: Callable[[], Call]) -> Model:
    return Model(f"torch/{name}", architecture, build, call)


def _ids(vocab: int, length: int = 10, batch: int = 3) -> Callable[[], Call]:
    return lambda: Call((tokens(vocab, length, batch),))


def _transformers() -> list[Model]:
    options: dict[str, Any] = {"d_model": 64, "nhead": 4, "dim_feedforward": 128, "batch_first": True}
    pair = floats((2, 10, 64), (2, 7, 64))

    def encoder(**more: Any) -> nn.Module:
        layer = nn.TransformerEncoderLayer(**{**options, **more})
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return [
        _entry(
            "transformer", "transformer", lambda: nn.Transformer(**options, num_encoder_layers=2, num_decoder_layers=2),
            pair,
        ),
        _entry("encoder", "transformer encoder", encoder, _SEQUENCE),
        _entry("encoder_norm_first", "transformer encoder", lambda: encoder(norm_first=True, bias=False), _SEQUENCE),
        _entry(
            "decoder", "transformer decoder",
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 2), pair,
        ),
        _entry("attention", "multihead attention", layers.Attention, pair),
        _entry("attention_dims", "multihead attention", lambda: layers.Attention(kdim=64, vdim=64, add_bias_kv=True),
            pair),
        _entry("attention_masked", "multihead attention", lambda: layers.Attention(masked=True, bias=False), pair),
        _entry("attention_kdim", "multihead attention", lambda: layers.Attention(kdim=80, vdim=80), floats((2, 10,
            64), (2, 7, 80))),
    ]  # fmt: skip


def _recurrent() -> list[Model]:
    kinds: dict[str, tuple[type[nn.Module], dict[str, Any], int]] = {
        "lstm": (nn.LSTM, {}, 64),
        "lstm_two_layers": (nn.LSTM, {"num_layers": 2, "dropout": 0.2}, 64),
        "lstm_bidirectional": (nn.LSTM, {"bidirectional": True}, 128),
        "lstm_projected": (nn.LSTM, {"proj_size": 48}, 48),
        "gru": (nn.GRU, {}, 64),
        "gru_bidirectional": (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}, 128),
        "rnn": (nn.RNN, {}, 64),
        "rnn_relu": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}, 64),
    }

    def build(
        kind: type[nn.Module], options: dict[str, Any], width: int, of: type = layers.Tagger
    ) -> Callable[[], Any]:
        return lambda: of(kind(64, 64, batch_first=True, **options), width)

    found = [_entry(name, name.partition("_")[0], build(*how), _ids(128)) for name, how in kinds.items()]
    found.append(_entry("lstm_packed", "lstm", build(nn.LSTM, {}, 64, layers.Packed), _ids(128)))
    for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        found.append(
            _entry(cell.__name__.lower(), cell.__name__, lambda cell=cell: layers.Cells(cell(64, 64)), _SEQUENCE)
        )
    return found


def _activated(kind: Callable[..., nn.Module], width: int, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(width, 64, 3, **options), nn.ReLU())


def _convolutions() -> list[Model]:
    shapes = {1: (2, 48, 20), 2: (2, 32, 9, 10), 3: (2, 32, 5, 6, 4)}
    found = []
    for axes, shape in shapes.items():
        plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        turned = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[axes]
        for name, options in (
            ("", {"padding": 1}),
            ("_strided", {"stride": 2, "dilation": 2, "padding": 2}),
            ("_grouped", {"groups": 2, "padding": 1}),
            ("_circular", {"padding": "same", "padding_mode": "circular"}),
        ):
            build = _activated(plain, shape[1], options)
            found.append(_entry(f"conv{axes}d{name}", f"conv{axes}d", build, floats(shape)))
        for name, options in (("", {"stride": 2, "output_padding": 1}), ("_grouped", {"groups": 2, "padding": 1})):
            build = _activated(turned, shape[1], options)
            found.append(_entry(f"conv_transpose{axes}d{name}", f"transposed conv{axes}d", build, floats(shape)))
    return [
        *found,
        _entry("unet", "unet", layers.UNet, images(32)),
        _entry("hyper_conv", "dynamic convolution", raw.HyperConv, floats((2, 24, 8, 8))),
        _entry(
            "standardised", "standardised conv2d",
            lambda: nn.Sequential(layers.Standardised(16, 32, 3), nn.GroupNorm(4, 32), nn.ReLU(),
                layers.Standardised(32, 16, 3)),
            floats((2, 16, 9, 9)),
        ),
    ]  # fmt: skip


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64))


def _conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 3))


def _wrapped(wrap: Callable[[nn.Module], Any], build: Callable[[], nn.Sequential]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = build()
        for i in (0, 3):
            wrap(model[i])
        return model

    return made


def _normalised() -> list[Model]:
    ways: dict[str, Callable[[nn.Module], Any]] = {
        "weight_norm": parametrizations.weight_norm,
        "weight_norm_old": torch.nn.utils.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "spectral_norm_old": torch.nn.utils.spectral_norm,
        "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
        "pruned_rows": lambda layer: prune.ln_structured(layer, "weight", amount=0.25, n=2, dim=0),
    }
    found = []
    for name, wrap in ways.items():
        found.append(_entry(f"{name}_linear", name.removesuffix("_old"), _wrapped(wrap, _mlp), _SEQUENCE))
        found.append(_entry(f"{name}_conv", name.removesuffix("_old"), _wrapped(wrap, _conv), floats((2, 16, 9, 9))))
    found.append(_entry("orthogonal", "orthogonal", _reflections, _SEQUENCE))
    cayley = _wrapped(lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"), _mlp)
    found.append(_entry("orthogonal_cayley", "orthogonal", cayley, _SEQUENCE))
    return found


def _reflections() -> nn.Module:
    """The last layer alone: the map reads signs from its tensor's diagonal, so that one stays dense."""
    model = _mlp()
    parametrizations.orthogonal(model[3], orthogonal_map="householder")
    return model


def _raw() -> list[Model]:
    ways = ("matmul", "transposed", "einsum", "tensordot", "addmm", "columns")
    found = [_entry(f"raw_{how}", "raw mlp", lambda how=how: raw.RawMLP(how), floats((2, 10, 96))) for how in ways]
    for how in ("bmm", "matmul", "baddbmm", "einsum"):
        found.append(_entry(f"experts_{how}", "experts", lambda how=how: raw.Experts(how), _SEQUENCE))
    for how in ("rows", "chunk", "split", "view", "columns"):
        found.append(_entry(f"sliced_{how}", "sliced weight", lambda how=how: raw.Sliced(how), _SEQUENCE))
    pair = floats((4, 32), (4, 32))
    return [
        *found,
        _entry("experts_routed", "experts", raw.RoutedExperts, _SEQUENCE),
        _entry("mlp", "mlp", _mlp, _SEQUENCE),
        _entry("typed", "raw mlp", raw.Typed, floats((2, 10, 96))),
        _entry("lora", "lora", raw.LoRA, floats((2, 10, 128))),
        _entry("merged", "merged factors", raw.Merged, floats((2, 10, 96))),
        _entry("listed", "parameter list", raw.Listed, _SEQUENCE),
        _entry("tensor_train", "tensor train", raw.Factored, floats((2, 5, 256))),
        _entry("bilinear", "bilinear", lambda: layers.Bilinear(False), pair),
        _entry("bilinear_raw", "bilinear", lambda: layers.Bilinear(True), pair),
    ]


def _lookups() -> list[Model]:
    found = [
        _entry(f"bag_{mode}", "embedding bag", lambda mode=mode: layers.Bag(mode), _ids(256))
        for mode in ("sum", "mean", "max")
    ]
    return [
        *found,
        _entry("bag_raw", "embedding bag", lambda: layers.Bag("sum", raw=True), _ids(256)),
        _entry("tied", "tied lm", lambda: raw.TiedLM(False), _ids(256)),
        _entry("tied_read", "tied lm", lambda: raw.TiedLM(True), _ids(256)),
        _entry("adaptive_softmax", "adaptive softmax", layers.AdaptiveHead, _ids(400)),
        _entry(
            "padded_embedding", "embedding",
            lambda: nn.Sequential(nn.Embedding(256, 64, padding_idx=5), nn.Linear(64, 64)), _ids(256),
        ),
        _entry(
            "sparse_embedding", "embedding",
            lambda: nn.Sequential(nn.Embedding(256, 64, sparse=True), nn.Linear(64, 64)), _ids(256),
        ),
    ]  # fmt: skip
