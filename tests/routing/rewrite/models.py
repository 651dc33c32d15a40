"""Small models whose blocks are written in different ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WIDTH, HEADS, LENGTH = 16, 2, 24


class Plain(nn.Module):
    """Linear, activation as a function, dropout, linear, in the code of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(F.gelu(self.up(x))))


class Gated(nn.Module):
    """Two layers on one input, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Halves(nn.Module):
    """One layer whose output is cut in two, by a module."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * torch.sigmoid(b)


def sequence() -> nn.Module:
    """The same as a list of modules."""
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), Halves(), nn.Dropout(0.0), nn.Linear(20, WIDTH))


class Inner(nn.Module):
    """The first half of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(WIDTH, 40), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Outer(nn.Module):
    """The second, with what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(40, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dense(h) + x)


class Spread(nn.Module):
    """A block over two modules, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Inner(), Outer()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x), x)


class Attention(nn.Module):
    """Of a sequence to itself."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (s h e) -> s b h n e", s=3, h=HEADS)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(rearrange(y, "b h n e -> b n (h e)"))


class Layer(nn.Module):
    """Attention and a feed-forward block, each added to its input."""

    def __init__(self, causal: bool = False, block: type[nn.Module] = Plain) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.block = Attention(causal), block()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.block(self.norms[1](x))


def encoder(batch_first: bool = True) -> nn.Module:
    """torch's own, without dropout."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


FEED_FORWARD = {"plain": Plain, "gated": Gated, "sequence": sequence, "spread": Spread}


def x_of(seed: int, batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def jolted(model: nn.Module, seed: int = 0) -> nn.Module:
    """With Parameters that are all other than at the start, light branches' too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model
