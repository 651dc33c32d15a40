"""Two byte-level language models on the text in ``pydoc_data``, one routed, one dense and as long in its steps.

Run by ``routing.py lm``.
"""

from __future__ import annotations

import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx.routing import RoutedAutoregressiveAttention, RoutedFeedForward

BATCH, LENGTH, DEPTH, DIM, WINDOW = 1, 4096, 4, 128, 128
WIDTHS = (64, 80, 96, 128, 160)  # of dense models, of which that with the nearest step time is trained


class Dense(nn.Module):
    """Causal attention to all, and a feed-forward block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = max(1, dim // 32)
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.after = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.after(x)


def routed(dim: int) -> nn.Module:
    """A quarter of each window's queries, keys and values, and of its tokens for the heavy feed-forward block."""
    attention = RoutedAutoregressiveAttention(
        dim, num_heavy_tokens_q=WINDOW // 4, num_heavy_tokens_kv=WINDOW // 4, light_dim_head=32, light_heads=dim // 32,
        light_window_size=WINDOW, heavy_dim_head=32, heavy_heads=dim // 32, residual=True,
    )  # fmt: skip
    after = RoutedFeedForward(
        dim, num_heavy_tokens=WINDOW // 4, light_ff_mult=1, heavy_ff_mult=8, window=WINDOW, residual=True
    )
    return nn.Sequential(attention, after)


class Model(nn.Module):
    def __init__(self, dim: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, dim), nn.Embedding(LENGTH, dim)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.place.weight, std=0.5)
        self.blocks = nn.Sequential(*(make(dim) for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 256))

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss of each next byte, in nats."""
        x = self.embed(ids[:, :-1]) + self.place.weight[: ids.shape[1] - 1]
        return F.cross_entropy(self.head(self.blocks(x)).flatten(0, 1), ids[:, 1:].flatten())


def data() -> tuple[Tensor, Tensor]:
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, draw: torch.Generator) -> None:
    starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=draw)
    optimizer.zero_grad()
    model(torch.stack([ids[i : i + LENGTH + 1] for i in starts])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def step_seconds(model: nn.Module, ids: Tensor) -> float:
    optimizer, draw, times = torch.optim.AdamW(model.parameters(), 1e-3), torch.Generator().manual_seed(0), []
    for _ in range(6):
        start = time.perf_counter()
        step(model, optimizer, ids, draw)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def bits(model: nn.Module, ids: Tensor) -> float:
    """A byte of the held-out text."""
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return statistics.mean(float(model(part)) for part in rows.split(BATCH)[:8]) / math.log(2)


class Trained:
    """A model with the seconds it has been trained for, and the curve of held-out bits over them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.draw = model, torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        self.seconds, self.steps, self.curve = 0.0, 0, list[tuple[float, float]]()

    def until(self, seconds: float, train: Tensor, held_out: Tensor) -> None:
        while self.seconds < seconds:
            start = time.perf_counter()
            step(self.model, self.optimizer, train, self.draw)
            self.seconds += time.perf_counter() - start
            self.steps += 1
        self.curve.append((self.seconds, bits(self.model, held_out)))


def compare(seconds: float, plot: str | None) -> None:
    train, held_out = data()
    torch.manual_seed(0)
    ours = Model(DIM, routed)
    wanted = step_seconds(ours, train)
    times = {width: step_seconds(Model(width, Dense), train) for width in WIDTHS}
    width = min(times, key=lambda found: abs(times[found] - wanted))
    print(f"\na step takes {wanted:.3f} s routed, width {DIM}, and {times[width]:.3f} s dense, width {width}")
    torch.manual_seed(0)
    runs = {"routed": Trained(Model(DIM, routed)), "dense": Trained(Model(width, Dense))}
    print(f"\n| seconds | {' | '.join(runs)} |\n|---|---|---|")
    for part in range(1, 11):  # in turns, so that a drift of the machine's speed meets both alike
        for run in runs.values():
            run.until(seconds * part / 10, train, held_out)
        print(
            f"| {seconds * part / 10:.0f} | {' | '.join(f'{run.curve[-1][1]:.3f}' for run in runs.values())} |",
            flush=True,
        )
    print(f"\nbits a held-out byte; {', '.join(f'{name} {run.steps} steps' for name, run in runs.items())}")
    if plot:
        Path(plot).write_text(drawn({name: run.curve for name, run in runs.items()}))


def drawn(curves: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of bits over seconds."""
    points = [point for curve in curves.values() for point in curve]
    right, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    lines = []
    for i, (name, curve) in enumerate(curves.items()):
        color = ("#00796b", "#455a64")[i % 2]
        path = " ".join(f"{40 + 520 * x / right:.1f},{20 + 260 * (high - y) / (high - low or 1):.1f}" for x, y in curve)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        lines.append(f'<text x="480" y="{40 + 20 * i}" fill="{color}">{name}</text>')
    lines += [f'<text x="2" y="{24 if y == high else 284}">{y:.2f}</text>' for y in (high, low)]
    lines.append(f'<text x="300" y="315">seconds, to {right:.0f}</text>')
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 320" font-family="sans-serif">\n{body}\n</svg>\n'
