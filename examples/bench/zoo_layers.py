"""Small models around layers of torch.nn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_raw import raw_parameter


class Standardised(nn.Conv2d):
    """A convolution that standardises its filters."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class UNet(nn.Module):
    """Down and up again, with skip connections."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = self._block(3, width)
        self.down = nn.ModuleList(self._block(width * 2**i, width * 2 ** (i + 1)) for i in range(2))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(width * 2 ** (i + 1), width * 2**i, 2, 2) for i in reversed(range(2))
        )
        self.merge = nn.ModuleList(self._block(width * 2 ** (i + 1), width * 2**i) for i in reversed(range(2)))
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Module:
        layers = [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.first(x)]
        for down in self.down:
            kept.append(down(F.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)


class Bilinear(nn.Module):
    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.layer = None if raw else nn.Bilinear(32, 32, 24)
        self.weight = raw_parameter(24, 32, 32) if raw else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.layer is not None:
            return self.layer(x, y)
        return F.bilinear(x, y, self.weight)


class Cells(nn.Module):
    """A recurrent cell in a loop."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, found = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)


class Tagger(nn.Module):
    """An embedding, a recurrent layer and a head."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.recurrent, self.head = nn.Embedding(128, 64), recurrent, nn.Linear(width, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(ids))[0])


class Packed(Tagger):
    """The same over sequences of unequal lengths."""

    def forward(self, ids: Tensor) -> Tensor:
        lengths = torch.arange(ids.shape[1], ids.shape[1] - ids.shape[0], -1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)[0])


class AdaptiveHead(nn.Module):
    """nn.AdaptiveLogSoftmaxWithLoss over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, 64)
        self.loss = nn.AdaptiveLogSoftmaxWithLoss(64, 400, [100, 250], div_value=2.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        return self.loss(x, ids.flatten()).output


class Attention(nn.Module):
    """nn.MultiheadAttention in one of its forms."""

    def __init__(self, masked: bool = False, **options: object) -> None:
        super().__init__()
        self.masked = masked
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = (
            torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool, device=x.device).triu(1) if self.masked else None
        )
        return self.attention(x, memory, memory, attn_mask=mask)


class Bag(nn.Module):
    """Sums, means or maxima of embeddings, by the layer or by the function."""

    def __init__(self, mode: str, raw: bool = False) -> None:
        super().__init__()
        self.mode, self.raw = mode, raw
        self.table = raw_parameter(256, 64) if raw else nn.EmbeddingBag(256, 64, mode=mode)
        self.head = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        if self.raw:
            return self.head(F.embedding_bag(ids, self.table, mode=self.mode))
        return self.head(self.table(ids))
