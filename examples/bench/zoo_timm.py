"""timm: one or two models of each family, the smallest there are, on small images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn
from zoo_models import Model, images

_VIT = {"embed_dim": 96, "depth": 2, "num_heads": 4}

# name, architecture, size of the images, what is changed of the model: fewer blocks, narrower ones
_MODELS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("beit_base_patch16_224", "beit", 64, {"img_size": 64, **_VIT}),
    ("beitv2_base_patch16_224", "beit", 64, {"img_size": 64, **_VIT}),
    ("halonet26t", "halonet", 256, {}),
    ("lambda_resnet26t", "lambda resnet", 64, {}),
    ("botnet26t_256", "botnet", 64, {"img_size": 64}),
    ("mobileone_s1", "mobileone", 64, {}),
    ("gernet_s", "gernet", 64, {}),
    ("regnetz_b16", "regnetz", 64, {}),
    ("repvgg_a0", "repvgg", 64, {}),
    ("cait_xxs24_224", "cait", 64, {"img_size": 64, "depth": 2}),
    ("coat_lite_tiny", "coat", 64, {"img_size": 64}),
    ("convit_tiny", "convit", 64, {"img_size": 64, "depth": 3, "local_up_to_layer": 2}),
    ("convnext_atto", "convnext", 64, {"depths": (1, 1, 2, 1)}),
    ("convnextv2_atto", "convnextv2", 64, {"depths": (1, 1, 2, 1)}),
    ("cpubone_nano", "cpubone", 64, {}),
    ("crossvit_9_240", "crossvit", 240, {"depth": ((1, 2, 0),)}),
    ("csatv2", "csatv2", 256, {}),
    ("cs3darknet_focus_s", "cspnet", 64, {}),
    ("darknet17", "darknet", 64, {}),
    ("cspnext_tiny", "cspnext", 64, {}),
    ("davit_tiny", "davit", 64, {"depths": (1, 1, 1, 1), "embed_dims": (48, 96, 96, 192), "num_heads": (3, 6, 6, 12)}),
    ("deepseek_vit_412m", "deepseek vit", 56, {"img_size": 56, "embed_dim": 96, "depth": 2, "num_heads": 4}),
    ("deit_tiny_distilled_patch16_224", "deit", 64, {"img_size": 64, "depth": 2}),
    ("deit3_small_patch16_224", "deit3", 64, {"img_size": 64, "depth": 2}),
    ("densenet121", "densenet", 64, {"block_config": (2, 2, 3, 2)}),
    ("dla46_c", "dla", 64, {}),
    ("dpn48b", "dpn", 64, {"k_sec": (1, 2, 2, 1)}),
    ("edgenext_xx_small", "edgenext", 64, {}),
    ("efficientformer_l1", "efficientformer", 224, {"depths": (1, 1, 1, 2)}),
    ("efficientformerv2_s0", "efficientformerv2", 64, {"img_size": 64}),
    ("efficientnet_b0", "efficientnet", 64, {}),
    ("tf_efficientnet_b0", "tf efficientnet", 64, {}),
    ("tf_efficientnetv2_b0", "efficientnetv2", 64, {}),
    ("efficientnet_es", "efficientnet edge", 64, {}),
    ("mnasnet_small", "mnasnet", 64, {}),
    ("mobilenetv2_050", "mobilenetv2", 64, {}),
    ("mobilenet_edgetpu_v2_xs", "mobilenet edgetpu", 64, {}),
    ("fbnetc_100", "fbnet", 64, {}),
    ("spnasnet_100", "spnasnet", 64, {}),
    ("tinynet_e", "tinynet", 64, {}),
    ("mixnet_s", "mixnet", 64, {}),
    ("tf_mixnet_s", "mixnet", 64, {}),
    ("efficientvim_m1", "efficientvim", 64, {}),
    ("efficientvit_b0", "efficientvit mit", 64, {}),
    ("efficientvit_m0", "efficientvit msra", 64, {"img_size": 64}),
    ("eva02_tiny_patch14_224", "eva", 56, {"img_size": 56, "depth": 2}),
    ("vit_medium_patch16_rope_reg1_gap_256", "rope vit", 64, {"img_size": 64, **_VIT}),
    ("fasternet_t0", "fasternet", 64, {}),
    ("fastvit_t8", "fastvit", 64, {}),
    ("gemma4_vit_167m", "gemma4 vit", 96, {"img_size": 96, "embed_dim": 96, "depth": 2, "num_heads": 4}),
    ("ghostnet_050", "ghostnet", 64, {}),
    ("ghostnetv2_100", "ghostnetv2", 64, {}),
    ("hardcorenas_a", "hardcorenas", 64, {}),
    ("hgnetv2_b0", "hgnetv2", 64, {}),
    ("hgnet_tiny", "hgnet", 64, {}),
    ("hiera_tiny_224", "hiera", 224, {"stages": (1, 1, 1, 1), "embed_dim": 48}),
    ("hrnet_w18_small", "hrnet", 64, {}),
    ("iformer_t", "iformer", 64, {}),
    ("inception_next_atto", "inception next", 64, {"depths": (1, 1, 2, 1)}),
    ("inception_v3", "inception v3", 139, {}),
    ("inception_v4", "inception v4", 139, {}),
    ("lcnet_050", "lcnet", 64, {}),
    ("lcnetv2_small", "lcnetv2", 64, {}),
    ("levit_128s", "levit", 128, {"img_size": 128}),
    ("levit_conv_128s", "levit", 128, {"img_size": 128}),
    ("lowformer_b0", "lowformer", 64, {}),
    ("test_mambaout", "mambaout", 64, {}),
    ("coatnet_pico_rw_224", "coatnet", 64, {"img_size": 64}),
    ("maxvit_pico_rw_256", "maxvit", 64, {"img_size": 64}),
    ("maxxvit_rmlp_nano_rw_256", "maxxvit", 64, {"img_size": 64}),
    ("test_efficientnet", "efficientnet", 64, {}),
    ("mobilenetv3_small_050", "mobilenetv3", 64, {}),
    ("mobilenetv4_conv_small_050", "mobilenetv4", 64, {}),
    ("mobilevit_xxs", "mobilevit", 64, {}),
    ("mobilevitv2_050", "mobilevitv2", 64, {}),
    ("mvitv2_tiny", "mvitv2", 64, {"img_size": 64}),
    ("naflexvit_base_patch16_gap", "naflexvit", 64, {**_VIT}),
    ("nextvit_small", "nextvit", 64, {"depths": (1, 1, 5, 1)}),
    ("nf_regnet_b0", "nf regnet", 64, {}),
    ("nf_resnet26", "nf resnet", 64, {}),
    ("eca_nfnet_l0", "nfnet", 64, {}),
    ("pit_ti_224", "pit", 64, {"img_size": 64}),
    ("pvt_v2_b0", "pvt v2", 64, {"depths": (1, 1, 1, 1)}),
    ("qwen3_vit_88m", "qwen3 vit", 96, {"img_size": 96, "embed_dim": 96, "depth": 2, "num_heads": 4}),
    ("rdnet_tiny", "rdnet", 64, {"num_blocks_list": (1, 1, 2, 1), "is_downsample_block": (None, True, True, True),
        "block_type": ("Block", "Block", "BlockESE", "Block"), "growth_rates": (32, 32, 32, 32),
        "bottleneck_width_ratio": 4}),
    ("regnetx_002", "regnetx", 64, {}),
    ("regnety_002", "regnety", 64, {}),
    ("repghostnet_050", "repghost", 64, {}),
    ("repvit_m0_9", "repvit", 64, {}),
    ("res2net50_14w_8s", "res2net", 64, {"layers": (1, 1, 1, 1)}),
    ("resnest14d", "resnest", 64, {}),
    ("resnet18", "resnet", 64, {}),
    ("resnet10t", "resnet", 64, {}),
    ("gcresnext26ts", "gcresnet", 64, {}),
    ("gcvit_xxtiny", "gcvit", 64, {"img_size": 64}),
    ("selecsls42", "selecsls", 64, {}),
    ("vitamin_small_224", "vitamin", 64, {"img_size": 64}),
    ("sam2_hiera_tiny", "hieradet", 64, {"embed_dim": 48, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}),
    ("ecaresnext26t_32x4d", "resnext", 64, {"layers": (1, 1, 1, 1)}),
    ("seresnext26d_32x4d", "se-resnext", 64, {"layers": (1, 1, 1, 1)}),
    ("resnetblur18", "resnet blur", 64, {}),
    ("resnetv2_18", "resnetv2", 64, {}),
    ("rexnet_100", "rexnet", 64, {}),
    ("legacy_seresnet18", "senet", 64, {}),
    ("sequencer2d_s", "sequencer", 64, {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (48, 96, 96, 96),
        "hidden_sizes": (24, 48, 48, 48)}),
    ("shvit_s1", "shvit", 128, {}),
    ("skresnet18", "sknet", 64, {}),
    ("starnet_s050", "starnet", 64, {}),
    ("swiftformer_xs", "swiftformer", 64, {}),
    ("swin_tiny_patch4_window7_224", "swin", 56, {"img_size": 56, "depths": (2, 2, 1, 1), "embed_dim": 48}),
    ("swinv2_tiny_window8_256", "swinv2", 64, {"img_size": 64, "depths": (2, 2, 1, 1), "embed_dim": 48,
        "window_size": 4}),
    ("swinv2_cr_tiny_224", "swinv2-cr", 64, {"img_size": 64, "depths": (2, 2, 1, 1), "embed_dim": 48}),
    ("tiny_vit_5m_224", "tinyvit", 64, {"depths": (1, 1, 2, 1)}),
    ("tnt_s_patch16_224", "tnt", 64, {"img_size": 64, "depth": 2}),
    ("tresnet_m", "tresnet", 64, {"layers": (1, 1, 1, 1)}),
    ("twins_svt_small", "twins", 64, {"img_size": 64, "depths": (2, 2, 2, 2)}),
    ("twins_pcpvt_small", "twins", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    ("vgg11_bn", "vgg", 64, {"mlp_ratio": 0.125}),
    ("visformer_tiny", "visformer", 64, {"img_size": 64, "depth": (1, 2, 1)}),
    ("test_vit", "vit", 160, {}),
    ("test_vit2", "vit", 160, {}),
    ("test_vit4", "vit", 160, {}),
    ("vit_base_patch16_siglip_224", "siglip vit", 64, {"img_size": 64, **_VIT}),
    ("vit_base_patch16_clip_224", "clip vit", 64, {"img_size": 64, **_VIT}),
    ("vit_small_patch14_dinov2", "dinov2", 56, {"img_size": 56, "depth": 2, "embed_dim": 96, "num_heads": 4}),
    ("flexivit_small", "flexivit", 64, {"img_size": 64, "depth": 2}),
    ("vit_tiny_r_s16_p8_224", "hybrid vit", 64, {"img_size": 64, "depth": 2}),
    ("test_vit_relpos", "relpos vit", 160, {}),
    ("vit_relpos_small_patch16_224", "relpos vit", 64, {"img_size": 64, "depth": 2}),
    ("samvit_base_patch16_224", "sam vit", 64, {"img_size": 64, **_VIT, "global_attn_indexes": (1,), "window_size": 3}),
    ("ese_vovnet19b_slim", "vovnet", 64, {}),
    ("legacy_xception", "xception", 96, {}),
    ("xception41p", "aligned xception", 64, {}),
    ("xcit_nano_12_p16_224", "xcit", 64, {"img_size": 64, "depth": 2}),
)  # fmt: skip


# The same for families whose named models take no changes: the class is called. A name after "@" is one of its module.
_CLASSES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("convmixer:ConvMixer", "convmixer", 56, {"dim": 96, "depth": 3}),
    ("focalnet:FocalNet", "focalnet", 64, {"depths": (1, 1, 1, 1), "embed_dim": 48}),
    ("metaformer:MetaFormer", "poolformer", 64, {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128)}),
    (
        "metaformer:MetaFormer", "convformer", 64,
        {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128), "token_mixers": "@SepConv",
            "norm_layers": "@LayerNorm2dNoBias"},
    ),
    (
        "metaformer:MetaFormer", "caformer", 64,
        {
            "depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128),
            "token_mixers": ["@SepConv", "@SepConv", "@Attention", "@Attention"],
            "norm_layers": ["@LayerNorm2dNoBias"] * 2 + ["@LayerNormNoBias"] * 2,
        },
    ),
    ("mlp_mixer:MlpMixer", "mlp-mixer", 64, {"img_size": 64, "num_blocks": 2, "embed_dim": 96}),
    (
        "mlp_mixer:MlpMixer", "gmixer", 64,
        {"img_size": 64, "num_blocks": 2, "embed_dim": 96, "mlp_ratio": (1.0, 4.0), "mlp_layer": "@GluMlp"},
    ),
    (
        "mlp_mixer:MlpMixer", "resmlp", 64,
        {"img_size": 64, "num_blocks": 2, "embed_dim": 96, "mlp_ratio": 4, "block_layer": "@ResBlock",
            "norm_layer": "@Affine"},
    ),
    (
        "mlp_mixer:MlpMixer", "gmlp", 64,
        {"img_size": 64, "num_blocks": 2, "embed_dim": 96, "mlp_ratio": 4, "block_layer": "@SpatialGatingBlock",
            "mlp_layer": "@GatedMlp"},
    ),
    ("nest:Nest", "nest", 64, {"img_size": 64, "depths": (1, 1, 2), "embed_dims": (48, 96, 192), "num_heads": (3, 6,
        12)}),
    ("resnetv2:ResNetV2", "bit", 64, {"layers": (1, 1, 1, 1), "width_factor": 0.5, "conv_layer": "@StdConv2d"}),
    ("resnetv2:ResNetV2", "resnetv2 aa", 64, {"layers": (1, 1, 1, 1), "stem_type": "deep"}),
    (
        "volo:VOLO", "volo", 64,
        {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (96, 192, 192, 192), "num_heads": (3, 6, 6, 6)},
    ),
)  # fmt: skip


def models() -> list[Model]:
    """The entries."""
    named = [
        Model(f"timm/{name}", architecture, _named(name, changes), images(size))
        for name, architecture, size, changes in _MODELS
    ]
    classes = [
        Model(f"timm/{architecture.replace(' ', '_')}_small", architecture, _of(where, changes), images(size))
        for where, architecture, size, changes in _CLASSES
    ]
    return named + classes


def _of(where: str, changes: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        name, _, kind = where.partition(":")
        module = importlib.import_module(f"timm.models.{name}")

        def value(given: Any) -> Any:
            if isinstance(given, list):
                return [value(item) for item in given]
            return getattr(module, given[1:]) if isinstance(given, str) and given.startswith("@") else given

        return getattr(module, kind)(num_classes=16, **{key: value(given) for key, given in changes.items()})

    return build


def _named(name: str, changes: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **{"num_classes": 16, **changes})

    return build
