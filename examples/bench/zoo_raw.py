"""Plain models that use raw Parameters, other modules' weights, and normalised or pruned ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _raw(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class RawMLP(nn.Module):
    """Linear maps of raw Parameters, in one of the ways torch has for them."""

    def __init__(self, how: str, width: int = 96) -> None:
        super().__init__()
        self.how = how
        self.up, self.down, self.bias = _raw(width, 2 * width), _raw(2 * width, width), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "matmul":
            return torch.matmul(F.gelu(x @ self.up), self.down) + self.bias
        if self.how == "transposed":
            return F.linear(F.gelu(F.linear(x, self.up.t())), self.down.transpose(0, 1), self.bias)
        if self.how == "einsum":
            return torch.einsum("btf,fc->btc", F.gelu(torch.einsum("btc,cf->btf", x, self.up)), self.down) + self.bias
        if self.how == "tensordot":
            return torch.tensordot(F.gelu(torch.tensordot(x, self.up, 1)), self.down, ([2], [0])) + self.bias
        flat = x.flatten(0, 1)
        if self.how == "addmm":
            return torch.addmm(self.bias, F.gelu(flat @ self.up), self.down).view_as(x)
        return (self.down.T @ F.gelu(self.up.T @ flat.T)).T.reshape(x.shape) + self.bias


class Experts(nn.Module):
    """Experts ``[E, in, out]``, all of them for every token, weighted by a router."""

    def __init__(self, how: str, experts: int = 4, width: int = 64) -> None:
        super().__init__()
        self.how = how
        self.router = nn.Linear(width, experts)
        self.up, self.down = _raw(experts, width, 2 * width), _raw(experts, 2 * width, width)
        self.bias = nn.Parameter(torch.zeros(experts, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.flatten(0, 1)
        weights = self.router(x).softmax(-1)
        if self.how == "einsum":
            y = torch.einsum("net,etc->nec", F.gelu(torch.einsum("nc,ect->net", x, self.up)), self.down)
            return torch.einsum("ne,nec->nc", weights, y).view(shape)
        every = x.expand(len(self.up), *x.shape)
        hidden = F.gelu(torch.matmul(every, self.up) if self.how == "matmul" else torch.bmm(every, self.up))
        if self.how == "baddbmm":
            y = torch.baddbmm(self.bias, hidden, self.down)
        else:
            y = hidden @ self.down + self.bias
        return torch.einsum("ne,enc->nc", weights, y).view(shape)


class RoutedExperts(nn.Module):
    """Experts ``[E, out, in]``, each called with the tokens that chose it."""

    def __init__(self, experts: int = 4, width: int = 64) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.gate_up, self.down = _raw(experts, 4 * width, width), _raw(experts, width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, chosen = self.router(flat).softmax(-1).topk(2)
        y = torch.zeros_like(flat)
        for i in range(len(self.gate_up)):
            rows, place = torch.where(chosen == i)
            gate, up = F.linear(flat[rows], self.gate_up[i]).chunk(2, -1)
            hidden = F.linear(F.silu(gate) * up, self.down[i])
            y = y.index_add(0, rows, hidden * weight[rows, place, None])
        return y.view_as(x)


class TiedLM(nn.Module):
    """The head is the embedding: one Parameter, or read from the other module."""

    def __init__(self, read: bool, vocab: int = 256, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width)
        self.head = None if read else nn.Linear(width, vocab, bias=False)
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embed(ids)))
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


class LoRA(nn.Module):
    """A frozen Linear and two raw factors beside it."""

    def __init__(self, width: int = 128, rank: int = 32) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = _raw(rank, width), _raw(width, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * (x @ self.a.T @ self.b.T)


class Merged(nn.Module):
    """A weight that is the sum of one and of a product of two more."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.weight, self.a, self.b = _raw(width, width), _raw(width, 48), _raw(48, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.a @ self.b)


class Sliced(nn.Module):
    """One Parameter of which parts are used: rows, columns, chunks and splits."""

    def __init__(self, how: str, width: int = 64) -> None:
        super().__init__()
        self.how, self.width = how, width
        self.qkv = _raw(3 * width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        w = self.width
        if self.how == "rows":
            q, k, v = (F.linear(x, self.qkv[i * w : (i + 1) * w]) for i in range(3))
        elif self.how == "chunk":
            q, k, v = (F.linear(x, part) for part in self.qkv.chunk(3))
        elif self.how == "split":
            q, k, v = (x @ part.t() for part in torch.split(self.qkv, [w, w, w]))
        elif self.how == "view":
            q, k, v = (F.linear(x, part) for part in self.qkv.view(3, w, w).unbind(0))
        else:
            half = w // 2
            q, k = F.linear(x[..., :half], self.qkv[:w, :half]), F.linear(x[..., half:], self.qkv[w : 2 * w, half:])
            v = F.linear(x, self.qkv[2 * w :])
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Listed(nn.Module):
    """Weights in a ParameterList and a ParameterDict."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.layers = nn.ParameterList(_raw(width, width) for _ in range(3))
        self.named = nn.ParameterDict({"in": _raw(width, 64), "out": _raw(64, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.named["in"])
        for layer in self.layers:
            x = torch.relu(x @ layer)
        return F.linear(x, self.named["out"])


class HyperConv(nn.Module):
    """Filters that a Linear mixes from a bank for each image, as a grouped convolution."""

    def __init__(self, channels: int = 24, banks: int = 4) -> None:
        super().__init__()
        self.bank = _raw(banks, channels, channels, 3, 3)
        self.mix = nn.Linear(channels, banks)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weights = self.mix(x.mean((2, 3))).softmax(-1)
        filters = torch.einsum("be,eocij->bocij", weights, self.bank).reshape(b * c, c, 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), filters, padding=1, groups=b).view(b, c, h, w)


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
        self.up = nn.ModuleList(nn.ConvTranspose2d(width * 2 ** (i + 1), width * 2**i, 2, 2) for i in reversed(range(2)))
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


class Factored(nn.Module):
    """A matrix in tensor-train form, contracted with einsum over several operands."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _raw(16, 16, 24), _raw(24, 16, 16)
        self.out = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:-1], 16, 16)
        return self.out(torch.einsum("btij,ior,rjp->btop", x, self.first, self.second).flatten(2))


class Bilinear(nn.Module):
    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.layer = None if raw else nn.Bilinear(32, 32, 24)
        self.weight = _raw(24, 32, 32) if raw else None

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
        mask = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool, device=x.device).triu(1) if self.masked else None
        return self.attention(x, memory, memory, attn_mask=mask)


class Bag(nn.Module):
    """Sums, means or maxima of embeddings, by the layer or by the function."""

    def __init__(self, mode: str, raw: bool = False) -> None:
        super().__init__()
        self.mode, self.raw = mode, raw
        self.table = _raw(256, 64) if raw else nn.EmbeddingBag(256, 64, mode=mode)
        self.head = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        if self.raw:
            return self.head(F.embedding_bag(ids, self.table, mode=self.mode))
        return self.head(self.table(ids))


class Typed(nn.Module):
    """Asks what kind of tensor its weight is before it uses it."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.weight = _raw(width, width)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, nn.Parameter) and isinstance(self.weight, Tensor)
        assert torch.is_tensor(self.weight) and torch.is_floating_point(self.weight)
        return F.linear(x, self.weight.to(x.dtype))
