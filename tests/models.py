"""Small models of many kinds, and the dense twin that a rewritten one is held against.

Classes are at module level so that models pickle. Each case names the Parameters that a rewrite must reach, so that
a test over all of them cannot pass by rewriting less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from rpqfx import Policy
from rpqfx.codebook import unpack_signs
from rpqfx.nn import RPQWeight
from tests.helpers import seen_as

SMALL = Policy(codebook_dim=4, codebook_bits=2, min_size=64)
SUFFIX = "_rpq"


# ---------------------------------------------------------------------------------------------------- the models


class MLP(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, width)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, (3, 2), groups=4, padding="same", dilation=(1, 2), padding_mode="reflect")
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32, padding=(1, 0))
        self.norm = nn.BatchNorm2d(32)
        self.point = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.norm(self.depthwise(self.grouped(x))))
        return self.head(self.point(x).mean((2, 3)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, groups=2, bias=False)
        self.up3 = nn.ConvTranspose2d(4, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up2(F.relu(self.up1(x)))
        size = [2 * y.shape[-2] + 1, 2 * y.shape[-1] + 2]
        return self.up3(y, output_size=size)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(x, src_key_padding_mask=padding))


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, dropout=0.1, kdim=12, vdim=8, add_bias_kv=True)
        self.self_attn = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor, memory: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attn(x, memory, values)
        z, nothing = self.self_attn(y, y, y, need_weights=False)
        assert nothing is None
        return y + z, weights


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        parts = self.qkv(self.norm1(x)).view(b, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(b, t, c)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class GPT(nn.Module):
    """Token embedding and head are one tensor; the position table is only added."""

    def __init__(self, vocab: int = 40, width: int = 16, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocab, width)
        self.pos = nn.Parameter(torch.randn(24, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tok.weight
        self.vocab = vocab

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        for _ in range(count):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        return ids


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(60, 16, mode="sum", padding_idx=3)
        self.users = nn.EmbeddingBag(30, 16, mode="mean", include_last_offset=True)
        self.city = nn.Embedding(20, 16, padding_idx=0, max_norm=2.0)
        self.out = nn.Linear(48, 8)

    def forward(self, items: Tensor, weights: Tensor, users: Tensor, offsets: Tensor, city: Tensor) -> Tensor:
        bags = [self.items(items, per_sample_weights=weights), self.users(users, offsets), self.city(city)]
        return self.out(torch.cat(bags, -1))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 8, 10)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.bilinear(first, second)


class Conv1D(nn.Module):
    """GPT-2's: the weight is ``[in, out]``."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.nf,)  # noqa: RUF005 (fx cannot unpack a size)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Functional(nn.Module):
    """Uses Parameters of its own in every product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.randn(24, 16) * 0.2)
        self.bias = nn.Parameter(torch.randn(24))
        self.right = nn.Parameter(torch.randn(24, 16) * 0.2)
        self.turned = nn.Parameter(torch.randn(20, 16) * 0.2)
        self.added = nn.Parameter(torch.randn(20, 16) * 0.2)
        self.summed = nn.Parameter(torch.randn(16, 24) * 0.2)
        self.conv1d = Conv1D(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.linear, self.bias)
        x = torch.tanh(x @ self.right)
        x = x @ self.turned.T
        x = torch.addmm(self.bias[:16], x.flatten(0, 1), self.added).view(x.shape[0], x.shape[1], 16)
        x = torch.einsum("btc,cd->btd", x, self.summed)
        return self.conv1d(x)


class FunctionalConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(16, 4, 3) * 0.3)
        self.up = nn.Parameter(torch.randn(16, 4, 3) * 0.3)
        self.two = nn.Parameter(torch.randn(16, 1, 3, 3) * 0.3)
        self.three = nn.Parameter(torch.randn(16, 2, 2, 2, 2) * 0.3)
        self.table = nn.Parameter(torch.randn(30, 4))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = F.embedding(ids, self.table).transpose(1, 2)
        x = F.conv_transpose1d(F.conv1d(x, self.one, stride=2, padding=1), self.up, stride=2)
        y = F.conv2d(x[:, None], self.two, padding=(0, 1))
        return x, F.conv3d(y.reshape(y.shape[0], 2, 2, -1, y.shape[-1])[..., :6], self.three, groups=1)


class Experts(nn.Module):
    """Every expert's matrix in one tensor ``[E, in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.up = nn.Parameter(torch.randn(3, 16, 24) * 0.2)
        self.down = nn.Parameter(torch.randn(3, 24, 16) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        hidden = F.silu(torch.bmm(x[None].expand(3, -1, -1), self.up))
        return torch.einsum("te,etd->td", share, torch.bmm(hidden, self.down))


class Opaque(nn.Module):
    """Which weight is used depends on values, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.positive = nn.Parameter(torch.randn(16, 16) * 0.3)
        self.negative = nn.Parameter(torch.randn(16, 16) * 0.3)
        self.gain = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        rows = [row @ (self.positive if row.sum() > 0 else self.negative.t()) for row in x]
        return torch.stack(rows) * self.gain[0] + self.gain.mean(0)


class Structured(nn.Module):
    """Takes and returns containers, None and plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(
        self,
        batch: dict[str, Any],
        extra: Tensor | None = None,
        *,
        mode: str = "sum",
        scales: tuple[float, ...] = (1.0,),
    ) -> dict[str, Any]:
        parts = [self.a(x) for x in batch["parts"]]
        y = self.b(batch["x"])
        if extra is not None:
            y = y + extra
        if mode == "sum":
            y = y + sum(parts)
        return {"y": y * scales[0], "parts": (parts, None), "mode": mode, "count": len(parts)}


class Shared(nn.Module):
    """One module called twice, under two names, and one Parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.other = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.other.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.other(torch.tanh(self.again(torch.tanh(self.first(x)))))))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(16, 16) * 0.3 for _ in range(2)])
        self.named = nn.ParameterDict({"out": torch.randn(16, 8) * 0.3})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(F.linear(x, weight))
        return x @ self.named["out"]


def double_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (2 * args[0], *args[1:])


def add_one(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + 1


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 16)
        self.fc.register_forward_pre_hook(double_input)
        self.fc.register_forward_hook(add_one)
        self.weighted = Conv1D(12, 16)
        self.weighted.register_forward_hook(add_one)

    def forward(self, x: Tensor) -> Tensor:
        return self.weighted(self.fc(x))


class ScaledLinear(nn.Linear):
    """Standardises its weight at each call, as weight-standardised convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.linear(x, (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-3), self.bias)


class StdConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).view_as(
            self.weight
        )
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = StdConv2d(3, 16, 3, padding=1)
        self.fc = ScaledLinear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


class Recurrent(nn.Module):
    """Every kind of recurrent layer, one in a subclass, over padded sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True, dropout=0.2, bidirectional=True, proj_size=8)
        self.gru = Halved(16, 16, bias=False)
        self.rnn = nn.RNN(16, 16, nonlinearity="relu")
        self.cells = nn.ModuleList([nn.LSTMCell(16, 16), nn.GRUCell(16, 16), nn.RNNCell(16, 16)])

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, (h, _) = self.lstm(packed)
        y, _ = nn.utils.rnn.pad_packed_sequence(y)
        y, _ = self.rnn(self.gru(y)[0])
        step, cell = self.cells[0](y[-1])
        return self.cells[2](self.cells[1](step, cell)), h


class Halved(nn.GRU):
    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, h = super().forward(x / 2, hx)
        return y * self.weight_ih_l0.mean(), h


class OutsideReader(nn.Module):
    """Reads a child's weight instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 16)
        self.table = nn.Embedding(20, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table.weight[ids] * self.table.weight.norm()
        return F.linear(x, self.fc.weight * 2, self.fc.bias) @ self.fc.weight


# ----------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """A model, inputs of one call, and the Parameters that must end up in codebooks."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    rewritten: tuple[str, ...]
    policy: Policy = field(default=SMALL)
    tied: dict[str, str] = field(default_factory=dict)  # further names of the Parameters above

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().to(dtype)

    def arguments(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs; floating tensors ask for a gradient."""
        args, kwargs = self.inputs(torch.Generator().manual_seed(seed))

        def ready(x: Any) -> Any:
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(dtype).requires_grad_() if floating else x

        return tree_map(ready, args), tree_map(ready, kwargs)


def frozen_mlp() -> nn.Module:
    model = MLP()
    model.fc1.weight.requires_grad_(False)
    model.fc2.bias.requires_grad_(False)
    return model


def _randn(*shape: int) -> Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda g: ((torch.randn(shape, generator=g),), {})


def _randint(high: int, *shape: int) -> Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda g: ((torch.randint(high, shape, generator=g),), {})


_BIDIRECTIONAL = tuple(
    f"lstm.weight_{part}_l{layer}{direction}"
    for layer in range(2)
    for direction in ("", "_reverse")
    for part in ("ih", "hh", "hr")
)
_BLOCK = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
_LAYER = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
CASES = [
    Case("mlp", MLP, _randn(5, 12), ("fc1.weight", "fc2.weight")),
    Case(
        "cnn",
        CNN,
        _randn(4, 3, 10, 10),
        ("stem.weight", "grouped.weight", "depthwise.weight", "point.weight", "head.weight"),
        Policy(codebook_dim=9, codebook_bits=1, min_size=64),
    ),
    Case(
        "decoder",
        Decoder,
        _randn(2, 16, 3, 4),
        ("up1.weight", "up2.weight", "up3.weight"),
        Policy(codebook_dim=9, codebook_bits=1, min_size=64),
    ),
    Case(
        "encoder",
        Encoder,
        _randn(3, 5, 16),
        (*(f"encoder.layers.{i}.{name}" for i in range(2) for name in _LAYER), "out.weight"),
    ),
    Case(
        "padded encoder",
        Encoder,
        lambda g: (
            (torch.randn(3, 5, 16, generator=g),),
            {"padding": torch.arange(5) >= torch.tensor([[5], [3], [4]])},
        ),
        (*(f"encoder.layers.{i}.{name}" for i in range(2) for name in _LAYER), "out.weight"),
    ),
    Case(
        "attention",
        CrossAttention,
        lambda g: (tuple(torch.randn(n, 3, width, generator=g) for n, width in ((5, 16), (6, 12), (6, 8))), {}),
        (
            *(f"attn.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")),
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
        ),
    ),
    Case(
        "gpt",
        GPT,
        _randint(40, 2, 7),
        ("tok.weight", *(f"blocks.{i}.{name}" for i in range(2) for name in _BLOCK)),
        tied={"head.weight": "tok.weight"},
    ),
    Case(
        "recommender",
        Recommender,
        lambda g: (
            (
                torch.randint(60, (4, 5), generator=g),
                torch.rand(4, 5, generator=g),
                torch.randint(30, (9,), generator=g),
                torch.tensor([0, 2, 2, 5, 9]),
                torch.randint(20, (4,), generator=g),
            ),
            {},
        ),
        ("items.weight", "users.weight", "city.weight", "out.weight"),
    ),
    Case(
        "bilinear",
        Pairs,
        lambda g: ((torch.randn(5, 6, generator=g), torch.randn(5, 8, generator=g)), {}),
        ("bilinear.weight",),
    ),
    Case(
        "functional",
        Functional,
        _randn(2, 3, 16),
        ("linear", "right", "turned", "added", "summed", "conv1d.weight"),
    ),
    Case(
        "functional convolutions",
        FunctionalConvs,
        _randint(30, 2, 9),
        ("one", "up", "two", "three", "table"),
        Policy(codebook_dim=4, codebook_bits=1, min_size=64),
    ),
    Case("experts", Experts, _randn(5, 16), ("up", "down"), Policy(codebook_dim=4, codebook_bits=2, min_size=64)),
    Case("opaque", Opaque, _randn(6, 12), ("first.weight", "positive", "negative")),
    Case(
        "structured",
        Structured,
        lambda g: (
            ({"x": torch.randn(3, 12, generator=g), "parts": [torch.randn(3, 12, generator=g) for _ in range(2)]},),
            {"extra": torch.randn(3, 16, generator=g), "scales": (0.5, 2.0)},
        ),
        ("a.weight", "b.weight"),
    ),
    Case(
        "structured, without",
        Structured,
        lambda g: (
            ({"x": torch.randn(3, 12, generator=g), "parts": [torch.randn(3, 12, generator=g)]}, None),
            {"mode": "none"},
        ),
        ("a.weight", "b.weight"),
    ),
    Case(
        "shared",
        Shared,
        _randn(3, 16),
        ("first.weight", "other.weight"),
        tied={"again.weight": "first.weight", "tied.weight": "other.weight"},
    ),
    Case("listed", Listed, _randn(3, 16), ("weights.0", "weights.1", "named.out")),
    Case("hooked", Hooked, _randn(3, 12), ("fc.weight", "weighted.weight")),
    Case(
        "subclassed",
        Subclassed,
        _randn(4, 3, 6, 6),
        ("conv.weight", "fc.weight"),
        Policy(codebook_dim=9, codebook_bits=1, min_size=64),
    ),
    Case(
        "recurrent",
        Recurrent,
        lambda g: ((torch.randn(3, 5, 12, generator=g), torch.tensor([3, 5, 2])), {}),
        (
            *_BIDIRECTIONAL,
            *(f"{name}.weight_{part}_l0" for name in ("gru", "rnn") for part in ("ih", "hh")),
            *(f"cells.{i}.weight_{part}" for i in range(3) for part in ("ih", "hh")),
        ),
    ),
    Case("read from outside", OutsideReader, _randint(20, 3, 4), ("fc.weight", "table.weight")),
    Case("frozen", frozen_mlp, _randn(5, 12), ("fc1.weight", "fc2.weight")),
]
BY_NAME = {case.name: case for case in CASES}


# ------------------------------------------------------------------------------------------------ the dense twin


def quantized_weights(model: nn.Module) -> dict[str, RPQWeight]:
    """Every quantized Parameter by its qualified name; tied ones under each name."""
    return {
        name.removesuffix(SUFFIX): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RPQWeight)
    }


def definition(weight: RPQWeight, leaves: Mapping[str, Tensor] | None = None) -> Tensor:
    """The tensor an RPQWeight stands for, written from the definition and differentiable in its ``leaves``."""
    stages, sub_vectors, count = weight.codes.shape
    held = dict(weight.named_parameters()) if leaves is None else leaves
    codebooks = held["codebooks"]
    share = sub_vectors // codebooks.shape[1]
    signs = None if weight.signs is None else 1 - 2 * unpack_signs(weight.signs, count).to(codebooks.dtype)
    columns = []
    for m in range(sub_vectors):
        parts = []
        for r in range(stages):
            entries = codebooks[r, m // share][weight.codes[r, m].long()]
            parts.append(entries if signs is None else entries * signs[r, m, :, None])
        columns.append(sum(parts))
    vectors = torch.cat(columns, 1)
    vectors = vectors * held["scale"][:, None] if "scale" in held else vectors
    if "column_scale" in held:
        vectors = vectors * held["column_scale"].repeat_interleave(weight.spec.column_scale_group)
    if weight.layout.zero_vector is not None:
        keep = torch.arange(count) != weight.layout.zero_vector
        vectors = vectors * keep[:, None].to(vectors.dtype)
    return seen_as(weight.layout, vectors)


def dense_run(
    dense: nn.Module, small: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Runs the original model with the weights that ``small`` stands for.

    Returns:
        Its outputs, and leaves under the names of ``small``'s Parameters, to take gradients by.
    """
    leaves = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in small.named_parameters()}
    first = {id(p): name for name, p in small.named_parameters()}
    held = quantized_weights(small)
    names = {id(p): name for name, p in dense.named_parameters()}
    expanded: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for alias, parameter in dense.named_parameters(remove_duplicate=False):
        name = names[id(parameter)]
        if name in held:
            weight = held[name]
            if id(weight) not in expanded:
                mine = {part: leaves[first[id(p)]] for part, p in weight.named_parameters()}
                expanded[id(weight)] = definition(weight, mine)
            weights[alias] = expanded[id(weight)]
        else:
            weights[alias] = leaves[name]
    return torch.func.functional_call(dense, weights, args, kwargs, tie_weights=False), leaves


def _at(model: nn.Module, name: str) -> nn.Parameter:
    path, _, attribute = name.rpartition(".")
    found = model.get_submodule(path)._parameters[attribute]
    assert found is not None
    return found


def filled(model: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of a dense model whose weights are the ones that ``small`` stands for."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in quantized_weights(small).items():
            _at(dense, name).copy_(definition(weight))
    return dense


def gradients(output: Any, wanted: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    """Gradients of a random linear function of all floating outputs."""
    g = torch.Generator().manual_seed(seed)
    found = [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.requires_grad]
    total = sum((x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in found)
    values = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if v is None else v.to_dense() if v.is_sparse else v
        for (name, x), v in zip(wanted.items(), values, strict=True)
    }


def assert_outputs(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    """Equal structure; tensors equal within tolerance, anything else exactly."""
    left, left_tree = tree_flatten(found)
    right, right_tree = tree_flatten(wanted)
    assert left_tree == right_tree
    for a, b in zip(left, right, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert a == b


def floating(values: Any) -> list[Tensor]:
    """Every floating tensor in a structure."""
    return [x for x in tree_flatten(values)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def assert_equals_dense(
    dense: nn.Module, small: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float = 1e-9
) -> None:
    """Outputs, gradients and buffers of ``small`` are those of ``dense`` holding the expanded weights."""
    dense = copy.deepcopy(dense)
    inputs = {f"input {i}": x for i, x in enumerate(floating((args, kwargs)))}
    torch.manual_seed(7)
    found = small(*args, **kwargs)
    torch.manual_seed(7)
    wanted, leaves = dense_run(dense, small, args, kwargs)
    assert_outputs(found, wanted, tolerance)
    trained = {name: p for name, p in small.named_parameters() if p.requires_grad}
    mine = gradients(found, {**trained, **inputs})
    theirs = gradients(wanted, {**{name: leaves[name] for name in trained}, **inputs})
    for name, grad in mine.items():
        torch.testing.assert_close(
            grad, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any(float(grad.abs().sum()) > 0 for grad in mine.values())
    buffers = dict(dense.named_buffers())
    for name, buffer in small.named_buffers():
        if name in buffers:
            torch.testing.assert_close(buffer, buffers[name], rtol=tolerance, atol=tolerance)
