"""vit-pytorch: its vision transformers, narrow ones of two blocks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Call, Model, floats, images

_WIDTHS = {"num_classes": 16, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128, "dim_head": 16}
_USUAL = {"image_size": 32, "patch_size": 8, **_WIDTHS}

# module, class, architecture, what the class is called with
_MODELS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("vit", "ViT", "vit", {**_USUAL, "dropout": 0.1, "emb_dropout": 0.1}),
    ("simple_vit", "SimpleViT", "simple vit", _USUAL),
    ("deepvit", "DeepViT", "deepvit", _USUAL),
    ("cait", "CaiT", "cait", {**_USUAL, "cls_depth": 1}),
    ("parallel_vit", "ViT", "parallel vit", _USUAL),
    ("ats_vit", "ViT", "adaptive token sampling vit", {**_USUAL, "max_tokens_per_depth": (12, 8)}),
    ("learnable_memory_vit", "ViT", "learnable memory vit", _USUAL),
    ("normalized_vit", "nViT", "nvit", _USUAL),
    ("pit", "PiT", "pit", {**_USUAL, "image_size": 64, "depth": (1, 1)}),
    ("rvt", "RvT", "rotary vit", {**_USUAL, "dim_head": 32}),
    ("simple_flash_attn_vit", "SimpleViT", "simple vit", _USUAL),
    ("simple_uvit", "SimpleUViT", "u-vit", _USUAL),
    ("simple_vit_with_fft", "SimpleViT", "fft vit", {**_USUAL, "freq_patch_size": 8}),
    ("simple_vit_with_qk_norm", "SimpleViT", "qk-norm vit", _USUAL),
    ("simple_vit_with_value_residual", "SimpleViT", "value residual vit", _USUAL),
    ("simple_vit_with_register_tokens", "SimpleViT", "register vit", _USUAL),
    ("simple_vit_with_patch_dropout", "SimpleViT", "patch dropout vit", _USUAL),
    ("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating", "sparse gating vit", _USUAL),
    ("vit_for_small_dataset", "ViT", "small dataset vit", _USUAL),
    ("vit_with_patch_merger", "ViT", "patch merger vit", _USUAL),
    ("vit_with_patch_dropout", "ViT", "patch dropout vit", _USUAL),
    ("vit_with_keel_post_ln", "ViT", "keel vit", _USUAL),
    ("vit_with_decorr", "ViT", "decorrelated vit", _USUAL),
    ("vit_detpool", "ViTDetPool", "detpool vit", _USUAL),
    ("vit_5", "ViT", "vit-5", _USUAL),
    ("jet_vit", "JetViT", "jet vit", {**_USUAL, "window_size": 3}),
    ("jumbo_vit", "JumboViT", "jumbo vit", {**_USUAL, "jumbo_cls_k": 2}),
    ("xcit", "XCiT", "xcit", {**_USUAL, "cls_depth": 1}),
    ("look_vit", "LookViT", "lookvit", {
        "dim": 64, "image_size": 64, "num_classes": 16, "depth": 2, "patch_size": 16, "heads": 4, "mlp_factor": 2,
            "dim_head": 16,
        "highres_patch_size": 8, "highres_mlp_factor": 2, "cross_attn_heads": 4, "cross_attn_dim_head": 16,
    }),
    ("attn_residual_with_dca_simple_vit", "SimpleViT", "dca vit", _USUAL),
    ("simple_vit_with_specialized_cls", "SimpleViT", "specialised cls vit", _USUAL),
    ("cct", "CCT", "cct", {
        "img_size": 32, "embedding_dim": 64, "n_conv_layers": 1, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2.0,
            "num_classes": 16,
        "positional_embedding": "learnable",
    }),
    ("cross_vit", "CrossViT", "crossvit", {
        "image_size": 32, "num_classes": 16, "sm_dim": 48, "lg_dim": 64, "sm_patch_size": 8, "sm_enc_heads": 4,
            "sm_enc_mlp_dim": 96,
        "sm_enc_dim_head": 16, "lg_enc_depth": 1, "lg_enc_heads": 4, "lg_enc_mlp_dim": 128, "lg_enc_dim_head": 16,
            "cross_attn_heads": 4,
        "cross_attn_dim_head": 16, "depth": 1,
    }),
    ("crossformer", "CrossFormer", "crossformer", {
        "dim": (32, 48, 64, 96), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 2, 1), "local_window_size": 2,
            "num_classes": 16,
    }),
    ("cvt", "CvT", "cvt", {
        "num_classes": 16, "s1_emb_dim": 32, "s2_emb_dim": 64, "s2_heads": 1, "s2_depth": 1, "s3_emb_dim": 96,
            "s3_heads": 2, "s3_depth": 1,
    }),
    ("levit", "LeViT", "levit", {
        "image_size": 128, "num_classes": 16, "stages": 3, "dim": (48, 64, 96), "depth": 1, "heads": (2, 3, 4),
            "mlp_mult": 2,
    }),
    ("max_vit", "MaxViT", "maxvit", {"num_classes": 16, "dim": 32, "depth": (1, 1), "dim_head": 16, "window_size": 4,
        "dim_conv_stem": 32}),
    ("mobile_vit", "MobileViT", "mobilevit", {
        "image_size": (64, 64), "dims": [32, 48, 64], "channels": [8, 16, 24, 24, 32, 32, 48, 48, 64, 64, 128],
            "num_classes": 16,
    }),
    ("nest", "NesT", "nest", {
        "image_size": 32, "patch_size": 4, "num_classes": 16, "dim": 32, "heads": 2, "num_hierarchies": 3,
            "block_repeats": (1, 1, 1),
        "dim_head": 16,
    }),
    ("regionvit", "RegionViT", "regionvit", {"dim": (32, 48, 64, 96), "depth": (1, 1, 1, 1), "window_size": 2,
        "num_classes": 16}),
    ("scalable_vit", "ScalableViT", "scalablevit", {
        "num_classes": 16, "dim": 32, "depth": (1, 1), "heads": (2, 4), "reduction_factor": (4, 2), "window_size": (8,
            None),
    }),
    ("sep_vit", "SepViT", "sepvit", {"num_classes": 16, "dim": 32, "depth": (1, 1), "heads": (2, 4), "window_size": 7,
        "dim_head": 16}),
    ("t2t", "T2TViT", "t2t-vit", {
        "image_size": 32, "num_classes": 16, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128, "dim_head": 16,
            "t2t_layers": ((3, 2), (3, 2)),
    }),
    ("twins_svt", "TwinsSVT", "twins", {
        "num_classes": 16, "s1_emb_dim": 32, "s2_emb_dim": 48, "s3_emb_dim": 64, "s4_emb_dim": 96, "s3_depth": 1,
            "s4_depth": 1,
        **{f"s{i}_{where}": size for i, size in ((1, 4), (2, 4), (3, 2), (4, 1)) for where in ("local_patch_size",
            "global_k")},
    }),
)  # fmt: skip

_SIZES = {
    "crossformer": 64,
    "cvt": 64,
    "levit": 128,
    "max_vit": 64,
    "mobile_vit": 64,
    "regionvit": 64,
    "pit": 64,
    "look_vit": 64,
    "twins_svt": 64,
    "scalable_vit": 64,
    "sep_vit": 112,
}


def models() -> list[Model]:
    """The entries."""
    found = []
    for module, kind, architecture, options in _MODELS:
        build = _builder(module, kind, options)
        found.append(Model(f"vit-pytorch/{module}", architecture, build, images(_SIZES.get(module, 32))))
    flat = {**_WIDTHS, "seq_len": 32, "patch_size": 8}
    clip = {**_WIDTHS, "image_size": 32, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
    video = floats((2, 3, 4, 32, 32))
    vivit = {key: value for key, value in clip.items() if key != "depth"}
    return [
        *found,
        Model("vit-pytorch/vit_1d", "vit 1d", _builder("vit_1d", "ViT", flat), floats((2, 3, 32))),
        Model("vit-pytorch/simple_vit_1d", "vit 1d", _builder("simple_vit_1d", "SimpleViT", flat), floats((2, 3, 32))),
        Model("vit-pytorch/vit_3d", "vit 3d", _builder("vit_3d", "ViT", clip), video),
        Model("vit-pytorch/simple_vit_3d", "vit 3d", _builder("simple_vit_3d", "SimpleViT", clip), video),
        Model("vit-pytorch/vivit", "vivit", _builder("vivit", "ViViT", {**vivit, "spatial_depth": 1,
            "temporal_depth": 1}), video),
        Model("vit-pytorch/na_vit", "navit", _builder("na_vit", "NaViT", {**_USUAL, "image_size": 64}), _pictures),
        Model("vit-pytorch/efficient", "efficient vit", _efficient, images(32)),
    ]  # fmt: skip


def _builder(module: str, kind: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**options)


class Mixer(nn.Module):
    """An encoder of torch's for vit-pytorch's model without one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _efficient() -> nn.Module:
    options = {key: _USUAL[key] for key in ("image_size", "patch_size", "num_classes", "dim")}
    return _builder("efficient", "ViT", {**options, "transformer": Mixer()})()


def _pictures() -> Call:
    return Call(([[torch.randn(3, 32, 40), torch.randn(3, 64, 16)], [torch.randn(3, 24, 24)]],))
