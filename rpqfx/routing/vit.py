"""RoutedViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from rpqfx.errors import InputError, SpecError
from rpqfx.routing.feedforward import RoutedFeedForward
from rpqfx.routing.image import ImageAttentionOptions, RoutedImageAttention
from rpqfx.validation.spelling import defaults_of, show_options


class RoutedViT(nn.Module):
    """A vision transformer whose blocks are routed, with fixed positions and a mean over patches.

    After Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022, arXiv:2205.01580.

    Args:
        image_size: Height and width of images, or both as a pair.
        patch_size: Height and width of patches, or both as a pair; divides ``image_size``.
        num_classes: Width of the result.
        dim: Width of tokens, a multiple of 4.
        depth: Blocks.
        attn_num_heavy_tokens_q: Queries that are chosen; a float is a share of the patches.
        attn_num_heavy_tokens_kv: Keys and values.
        ff_num_heavy_tokens: Tokens for the heavy feed-forward block.
        ff_light_mult: Hidden width of the light feed-forward block over ``dim``.
        ff_heavy_mult: Hidden width of the heavy one over ``dim``.
        channels: Of images.
        router: Arguments of each ``Router``.
        device: Where the tensors go.
        dtype: Of the Parameters.
        **attention: Further arguments of ``RoutedImageAttention``.

    Raises:
        SpecError: If a number makes no sense.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        attn_num_heavy_tokens_q: int | float,
        attn_num_heavy_tokens_kv: int | float,
        ff_num_heavy_tokens: int | float,
        ff_light_mult: float = 0.5,
        ff_heavy_mult: float = 4,
        channels: int = 3,
        router: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Unpack[ImageAttentionOptions],
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size = _pair(image_size), _pair(patch_size)
        if any(whole % part for whole, part in zip(self.image_size, self.patch_size, strict=True)):
            raise SpecError(f"patches of {self.patch_size} do not divide images of {self.image_size}")
        if dim % 4:
            raise SpecError(
                f"positions are sines and cosines of two coordinates; dim must be a multiple of 4, got {dim}"
            )
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        patch = channels * self.patch_size[0] * self.patch_size[1]
        self.embed = nn.Sequential(
            nn.LayerNorm(patch, **made), nn.Linear(patch, dim, **made), nn.LayerNorm(dim, **made)
        )
        numbers: dict[str, Any] = {
            "num_heavy_tokens_q": attn_num_heavy_tokens_q,
            "num_heavy_tokens_kv": attn_num_heavy_tokens_kv,
        }
        self.attentions = nn.ModuleList(
            RoutedImageAttention(dim, channel_first=False, residual=True, router=router, **numbers, **attention, **made)
            for _ in range(depth)
        )
        self.feed_forwards = nn.ModuleList(
            RoutedFeedForward(
                dim, num_heavy_tokens=ff_num_heavy_tokens, light_ff_mult=ff_light_mult, heavy_ff_mult=ff_heavy_mult,
                residual=True, router=router, **made,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Sequential(nn.LayerNorm(dim, **made), nn.Linear(dim, num_classes, **made))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to ``[B, num_classes]``.

        Raises:
            InputError: If images are of another size.
        """
        if images.dim() != 4 or tuple(images.shape[-2:]) != self.image_size:
            raise InputError(
                f"expected images [B, channels, {', '.join(map(str, self.image_size))}], got {list(images.shape)}"
            )
        p, q = self.patch_size
        x = self.embed(rearrange(images, "b c (h p) (w q) -> b h w (p q c)", p=p, q=q))
        height, width, dim = x.shape[1:]
        x = x + positions(height, width, dim, x.device).to(x.dtype)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            x = attention(x)
            x = rearrange(feed_forward(rearrange(x, "b h w d -> b (h w) d")), "b (h w) d -> b h w d", h=height)
        return self.head(reduce(x, "b h w d -> b d", "mean"))


show_options(RoutedViT.__init__, ImageAttentionOptions, defaults_of(RoutedImageAttention))


def positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of both coordinates at ``dim / 4`` speeds, ``[height, width, dim]`` float32."""
    speeds = 10_000.0 ** -(torch.arange(dim // 4, device=device) / max(dim // 4 - 1, 1))
    y, x = (torch.arange(size, device=device)[:, None] * speeds for size in (height, width))
    y, x = y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], -1)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
