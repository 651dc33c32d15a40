"""Three models as they are deployed, rewritten: a ViT, ResNet-20, and a decoder LM with a KV cache.

They are written plainly, with torch.nn's layers and nothing of this library. Their policies meet every way to hold a
weight: table and expanded matrix, rows and columns, residual stages, signs, scales, shared codebooks, convolutions,
and an embedding tied to the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import rpqfx
from rpqfx import Policy, Rule

# ---------------------------------------------------------------------------------------------------- the models


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, size: int = 32, patch: int = 8, width: int = 256, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.1)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class BasicBlock(nn.Module):
    """Two convolutions, and a shortcut without weights: every other pixel, and zeros for the new channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride, self.pad = stride, (after - before) // 2
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """He and others, 2015, section 4.2: for images of 32 x 32, with three blocks of each width."""

    def __init__(self, classes: int = 10, depth: int = 3) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = [16] + [16] * depth + [32] * depth + [64] * depth
        self.blocks = nn.Sequential(*(BasicBlock(a, b, b // a) for a, b in pairwise(widths)))
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.conv(images)))).mean((2, 3)))


Cache = list[tuple[Tensor, Tensor]]


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor], angles: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        b, t, c = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = torch.cat([past[0], rotate(k, angles)], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(rotate(q, angles), k, v, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, c))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), (k, v)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding of ``x [B, H, T, d]`` by ``angles [T, d / 2]``."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class DecoderLM(nn.Module):
    """Takes ids ``[B, T]`` and keys and values ``[B, H, P, d]`` of each block; returns logits and the longer cache."""

    def __init__(self, vocab: int = 512, width: int = 256, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.tok = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tok.weight

    def empty_cache(self, batch: int) -> Cache:
        shape = (batch, self.heads, 0, self.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]

    def forward(self, ids: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        before, now = past[0][0].shape[2], ids.shape[1]
        place = torch.arange(before, before + now, device=ids.device)
        mask = torch.arange(before + now, device=ids.device)[None] <= place[:, None]
        frequency = 10000 ** -torch.linspace(0, 1, self.head_dim // 2 + 1, device=ids.device)[:-1]
        angles = place[:, None] * frequency
        x, cache = self.tok(ids), []
        for block, one in zip(self.blocks, past, strict=True):
            x, new = block(x, one, angles, mask)
            cache.append(new)
        return self.head(self.norm(x)), cache


# ----------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Deployed:
    """A model, its policy, and how it is called.

    Args:
        build: The dense model.
        policy: How it is rewritten; codebooks are drawn, so that every test begins at once.
        inputs: Arguments of forward for some sizes.
        axes: Which axes of those arguments vary, by the name of the size.
        sizes: Those to export with, by name.
        others: Further sizes that must be served, the smallest among them.
    """

    build: Callable[[], nn.Module]
    policy: Policy
    inputs: Callable[..., tuple[Any, ...]]
    axes: tuple[Any, ...]
    sizes: dict[str, int]
    others: tuple[dict[str, int], ...]

    def dense(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def model(self) -> nn.Module:
        """The rewritten model; the same tensors at each call."""
        dense = self.dense()
        torch.manual_seed(0)
        return rpqfx.rpqify(dense, self.policy)

    def dynamic(self) -> tuple[Any, ...]:
        """``dynamic_shapes`` of torch.export: every size from the least that has a meaning."""
        least = {"batch": 1, "sequence": 1, "past": 0}
        known = {name: Dim(name, min=least[name], max=4096) for name in self.sizes}
        return replaced(self.axes, known)


def replaced(axes: Any, known: dict[str, Any]) -> Any:
    """The axes of arguments with each size's name replaced."""
    if isinstance(axes, dict):
        return {axis: known[name] for axis, name in axes.items()}
    return type(axes)(replaced(each, known) for each in axes)


def mark_dynamic(args: Any, axes: Any) -> Any:
    """The arguments, with their axes told to vary (those of size 0 and 1 apart, which torch takes as they are)."""
    if isinstance(args, Tensor):
        for axis in axes:
            if args.shape[axis] > 1:
                torch._dynamo.mark_dynamic(args, axis)
    else:
        for arg, ax in zip(args, axes, strict=True):
            mark_dynamic(arg, ax)
    return args


def run_as(plan: str, patch: pytest.MonkeyPatch) -> None:
    """Makes every product run one way; ``"auto"`` leaves the choice."""
    if plan != "auto":
        patch.setattr("rpqfx.ops.products.cheaper", lambda *args, **kwargs: plan)


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    """Equal within a tolerance of float32, which is relative to a tensor's largest element."""
    for ours, theirs in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)


def images(batch: int) -> tuple[Any, ...]:
    return (torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)),)


def tokens(batch: int, sequence: int, past: int, depth: int = 2) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(batch + sequence + past)
    ids = torch.randint(512, (batch, sequence), generator=g)
    return ids, [tuple(torch.randn(batch, 4, past, 64, generator=g) for _ in range(2)) for _ in range(depth)]


def _policy(*rules: Rule) -> Policy:
    return Policy(init="random", codebook_dim=128, codebook_bits=4, min_size=432, rules=rules)


_BATCHES = ({"batch": 1}, {"batch": 2}, {"batch": 8}, {"batch": 17})
_PAST = {0: "batch", 2: "past"}
DEPLOYED = {
    "vit": Deployed(
        ViT,
        _policy(
            Rule("patch", codebook_dim=16, codebook_bits=5, scale=True, grad_scale="sqrt"),
            Rule("*.qkv", codebook_bits=4, sharing="layer", signs=True),
            Rule("*.proj", codebook_dim=16, codebook_bits=3, stages=2),
            Rule("*.fc2", scale=True),
        ),
        images,
        ({0: "batch"},),
        {"batch": 3},
        _BATCHES,
    ),
    "resnet20": Deployed(
        ResNet20,
        _policy(Rule("head", codebook_dim=16, codebook_bits=2), Rule("*", codebook_dim=9, codebook_bits=3)),
        images,
        ({0: "batch"},),
        {"batch": 3},
        _BATCHES,
    ),
    "lm": Deployed(
        DecoderLM,
        _policy(
            Rule("tok", codebook_dim=16, codebook_bits=5, stages=2, scale=True),
            Rule("*.q", sharing="role"),
            Rule("*.o", codebook_dim=32, signs=True),
            Rule("*.up", signs=True, stages=2),
        ),
        tokens,
        ({0: "batch", 1: "sequence"}, [(_PAST, _PAST)] * 2),
        {"batch": 3, "sequence": 5, "past": 7},
        (
            {"batch": 2, "sequence": 4, "past": 0},
            {"batch": 1, "sequence": 1, "past": 4},
            {"batch": 5, "sequence": 1, "past": 31},
            {"batch": 8, "sequence": 13, "past": 2},
        ),
    ),
}
# The same with one block of each kind: what repeats takes a compiler as long again and shows nothing new.
SHALLOW = {
    "resnet": replace(DEPLOYED["resnet20"], build=partial(ResNet20, depth=1)),
    "small lm": replace(
        DEPLOYED["lm"],
        build=partial(DecoderLM, depth=1),
        inputs=partial(tokens, depth=1),
        axes=({0: "batch", 1: "sequence"}, [(_PAST, _PAST)]),
    ),
}
EVERY = {**DEPLOYED, **SHALLOW}
