"""torchvision: classification, segmentation, detection, video and optical flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_models import Call, Model, floats, images

_CLASSIFIERS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("densenet121", "densenet", 64, {}),
    ("efficientnet_b0", "efficientnet", 64, {}),
    ("googlenet", "googlenet", 64, {"init_weights": False}),
    ("inception_v3", "inception v3", 139, {"init_weights": False, "aux_logits": False}),
    ("mnasnet0_5", "mnasnet", 64, {}),
    ("mobilenet_v2", "mobilenetv2", 64, {}),
    ("mobilenet_v3_small", "mobilenetv3", 64, {}),
    ("regnet_x_400mf", "regnetx", 64, {}),
    ("regnet_y_400mf", "regnety", 64, {}),
    ("resnet18", "resnet", 64, {}),
    ("shufflenet_v2_x0_5", "shufflenetv2", 64, {}),
    ("squeezenet1_1", "squeezenet", 64, {}),
)  # fmt: skip
_SEGMENTERS = (
    ("lraspp_mobilenet_v3_large", "lraspp", 64),
    ("deeplabv3_mobilenet_v3_large", "deeplabv3", 64),
)
_DETECTORS = (
    ("FasterRCNN", "faster r-cnn", {}),
    ("RetinaNet", "retinanet", {}),
    ("FCOS", "fcos", {}),
    ("SSD", "ssd", {}),
    ("MaskRCNN", "mask r-cnn", {"masks": True}),
    ("KeypointRCNN", "keypoint r-cnn", {"keypoints": True}),
)
_VIDEO = (
    ("r3d_18", "resnet 3d", (1, 3, 4, 32, 32)),
    ("mc3_18", "resnet mc3", (1, 3, 4, 32, 32)),
    ("r2plus1d_18", "resnet (2+1)d", (1, 3, 4, 32, 32)),
)


def models() -> list[Model]:
    """The entries."""
    found = [
        Model(f"torchvision/{name}", architecture, _builder("", name, num_classes=16, **options), images(size))
        for name, architecture, size, options in _CLASSIFIERS
    ]
    for name, architecture, size in _SEGMENTERS:
        found.append(Model(f"torchvision/{name}", architecture, _plain("segmentation", name), images(size)))
    for name, architecture, targets in _DETECTORS:
        found.append(
            Model(
                f"torchvision/{name.lower()}_small", architecture, _detector(name), _pictures,
                lambda targets=targets: _training(**targets), grad_inputs=False,
            )
        )  # fmt: skip
    for name, architecture, shape in _VIDEO:
        found.append(Model(f"torchvision/{name}", architecture, _builder("video", name, num_classes=16), floats(shape)))
    return [*found, *_shrunk()]


def _shrunk() -> list[Model]:
    """Models whose classes are called, to make them smaller."""
    block = {"num_layers": 2, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 192, "num_classes": 16}
    swin = {"embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "num_classes": 16}

    def vit() -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(image_size=64, patch_size=16, **block)

    def swin_v1() -> nn.Module:
        from torchvision.models import SwinTransformer

        return SwinTransformer(patch_size=[4, 4], window_size=[4, 4], **swin)

    def swin_v2() -> nn.Module:
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

        parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
        return SwinTransformer(patch_size=[4, 4], window_size=[4, 4], **parts, **swin)

    def swin_3d() -> nn.Module:
        from torchvision.models.video import SwinTransformer3d

        return SwinTransformer3d(patch_size=[2, 4, 4], window_size=[2, 4, 4], **swin)

    def mvit() -> nn.Module:
        from torchvision.models.video.mvit import MSBlockConfig, MViT

        blocks = [
            MSBlockConfig(2, 96, 96, [3, 3, 3], [], [1, 4, 4], []),
            MSBlockConfig(4, 96, 192, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        ]  # fmt: skip
        return MViT(
            (32, 32), 4, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
            proj_after_attn=True, num_classes=16, patch_embed_kernel=(3, 7, 7), patch_embed_stride=(2, 4, 4),
        )  # fmt: skip

    def vgg() -> nn.Module:
        from torchvision.models import VGG
        from torchvision.models.vgg import make_layers

        model = VGG(make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True), num_classes=16, init_weights=False)
        model.classifier = nn.Sequential(nn.Linear(64 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 16))
        return model

    def raft() -> nn.Module:
        from torchvision.models.optical_flow import raft_small

        return raft_small(weights=None)

    flow = floats((1, 3, 128, 128), (1, 3, 128, 128))
    return [
        Model("torchvision/vit_small", "vit", vit, images(64)),
        Model("torchvision/swin_small", "swin", swin_v1, images(64)),
        Model("torchvision/swin_v2_small", "swinv2", swin_v2, images(64)),
        Model("torchvision/swin3d_small", "video swin", swin_3d, floats((1, 3, 4, 32, 32))),
        Model("torchvision/mvit_small", "mvit", mvit, floats((1, 3, 4, 32, 32))),
        Model("torchvision/vgg_small", "vgg", vgg, images(32)),
        Model("torchvision/raft_small", "raft", raft, lambda: Call(flow().args, {"num_flow_updates": 2})),
    ]


def _builder(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        place = getattr(torchvision.models, module) if module else torchvision.models
        return getattr(place, name)(weights=None, **options)

    return build


def _plain(module: str, name: str) -> Callable[[], nn.Module]:
    return _builder(module, name, weights_backbone=None, num_classes=5)


def _detector(name: str) -> Callable[[], nn.Module]:
    """A detector over two levels of a few convolutions, with few proposals."""

    def build() -> nn.Module:
        from torchvision.models import detection
        from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

        sizes: dict[str, Any] = {"min_size": 96, "max_size": 128, "num_classes": 2 if "Keypoint" in name else 5}
        anchors = AnchorGenerator(((16, 32), (48, 64)), ((0.5, 1.0),) * 2)
        if name == "SSD":
            boxes = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.5, 0.9])
            heads = detection.ssd.SSDHead([32, 32], boxes.num_anchors_per_location(), 5)
            few = {"head": heads, "detections_per_img": 5, "topk_candidates": 20}
            return detection.ssd.SSD(Pyramid(), boxes, (96, 96), 5, **few)
        if name == "FCOS":
            anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
        few = {"detections_per_img": 5, "topk_candidates": 20, "anchor_generator": anchors}
        if "RCNN" in name:
            few = {"box_detections_per_img": 5, "rpn_anchor_generator": anchors, "rpn_batch_size_per_image": 32}
            few |= {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
        return getattr(detection, name)(Pyramid(), **sizes, **few)

    return build


class Pyramid(nn.Module):
    """Two feature maps, a quarter and an eighth of an image."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 7, 4, 3), nn.BatchNorm2d(32), nn.ReLU())
        self.next = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.stem(x)
        return {"0": first, "1": self.next(first)}


def _pictures() -> Call:
    return Call(([torch.rand(3, 96, 96), torch.rand(3, 96, 112)],))


def _training(masks: bool = False, keypoints: bool = False) -> Call:
    targets = []
    for _ in range(2):
        target: dict[str, Any] = {
            "boxes": torch.tensor([[8.0, 10.0, 60.0, 70.0], [30.0, 20.0, 90.0, 80.0]]), "labels": torch.tensor([1, 1])
        }  # fmt: skip
        if masks:
            target["masks"] = (torch.rand(2, 96, 112) > 0.5).byte()
        if keypoints:
            target["keypoints"] = torch.cat([20 + 40 * torch.rand(2, 17, 2), torch.ones(2, 17, 1)], -1)
        targets.append(target)
    if masks:
        targets[0]["masks"] = targets[0]["masks"][..., :96]
    return Call((_pictures().args[0], targets))
