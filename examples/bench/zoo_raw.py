"""Plain models that use raw Parameters, and weights of other modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def raw_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class RawMLP(nn.Module):
    """Linear maps of raw Parameters, in one of the ways torch has for them."""

    def __init__(self, how: str, width: int = 96) -> None:
        super().__init__()
        self.how = how
        self.up, self.down = raw_parameter(width, 2 * width), raw_parameter(2 * width, width)
        self.bias = nn.Parameter(torch.zeros(width))

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
        self.up, self.down = raw_parameter(experts, width, 2 * width), raw_parameter(experts, 2 * width, width)
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
        self.gate_up, self.down = raw_parameter(experts, 4 * width, width), raw_parameter(experts, width, 2 * width)

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
        self.a, self.b = raw_parameter(rank, width), raw_parameter(width, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * (x @ self.a.T @ self.b.T)


class Merged(nn.Module):
    """A weight that is the sum of one and of a product of two more."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.weight, self.a, self.b = raw_parameter(width, width), raw_parameter(width, 48), raw_parameter(48, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.a @ self.b)


class Sliced(nn.Module):
    """One Parameter of which parts are used: rows, columns, chunks and splits."""

    def __init__(self, how: str, width: int = 64) -> None:
        super().__init__()
        self.how, self.width = how, width
        self.qkv = raw_parameter(3 * width, width)
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
        self.layers = nn.ParameterList(raw_parameter(width, width) for _ in range(3))
        self.named = nn.ParameterDict({"in": raw_parameter(width, 64), "out": raw_parameter(64, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.named["in"])
        for layer in self.layers:
            x = torch.relu(x @ layer)
        return F.linear(x, self.named["out"])


class HyperConv(nn.Module):
    """Filters that a Linear mixes from a bank for each image, as a grouped convolution."""

    def __init__(self, channels: int = 24, banks: int = 4) -> None:
        super().__init__()
        self.bank = raw_parameter(banks, channels, channels, 3, 3)
        self.mix = nn.Linear(channels, banks)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weights = self.mix(x.mean((2, 3))).softmax(-1)
        filters = torch.einsum("be,eocij->bocij", weights, self.bank).reshape(b * c, c, 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), filters, padding=1, groups=b).view(b, c, h, w)


class Factored(nn.Module):
    """A matrix in tensor-train form, contracted with einsum over several operands."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = raw_parameter(16, 16, 24), raw_parameter(24, 16, 16)
        self.out = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:-1], 16, 16)
        return self.out(torch.einsum("btij,ior,rjp->btop", x, self.first, self.second).flatten(2))


class Typed(nn.Module):
    """Asks what kind of tensor its weight is before it uses it."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.weight = raw_parameter(width, width)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor)
        assert torch.is_tensor(self.weight) and torch.is_floating_point(self.weight)
        return F.linear(x, self.weight.to(x.dtype))
