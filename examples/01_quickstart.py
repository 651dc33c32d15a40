"""Train a small GPT twice, dense and with its weights quantized, and compare the two.

The text is English that every Python carries (``pydoc_data.topics``), read as bytes; nothing is downloaded. Two more
rows keep the comparison honest: a smaller dense model of the same bytes, and the dense model converted after training.

    python examples/01_quickstart.py            # three to five minutes on two cores
    python examples/01_quickstart.py --quick    # a third of that, for CI (or set RPQFX_QUICK=1)
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's own, where numpy is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import rpqfx  # noqa: E402

CONTEXT, BATCH = 128, 16


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, dim: int = 384, depth: int = 3, heads: int = 6) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def read_text() -> tuple[Tensor, Tensor]:
    """All of Python's help topics as bytes: nine tenths for training, the last tenth for validation."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    split = int(0.9 * len(data))
    return data[:split], data[split:]


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, data: Tensor) -> float:
    windows = data[: len(data) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return sum(loss_of(model, part).item() * len(part) for part in windows.split(64)) / len(windows)


def train(name: str, model: nn.Module, data: Tensor, steps: int, rate: float) -> float:
    """Trains a model on the same batches as every other, and returns its tokens per second."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        first = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1), generator=draw)
        loss = loss_of(model, data[first + torch.arange(CONTEXT + 1)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        speed = step * BATCH * CONTEXT / (time.perf_counter() - start)
        if step % 10 == 0 or step == steps:
            end = "\n" if step == steps else ("\r" if sys.stdout.isatty() else "")
            text = f"{name}: step {step:4d} of {steps}, loss {loss.item():.3f}, {speed:,.0f} tokens/s"
            if end:
                print(text, end=end, flush=True)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", default=os.environ.get("RPQFX_QUICK") == "1")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", action="store_true", help="end with the rows as one line of JSON")
    arguments = parser.parse_args()
    steps = arguments.steps or (40 if arguments.quick else 150)
    torch.set_num_threads(2)
    training, validation = read_text()

    torch.manual_seed(0)
    dense = GPT()
    small = rpqfx.rpqify(dense, rpqfx.Policy.from_scratch(codebook_dim=64, codebook_bits=6, signs=True))
    report = rpqfx.report(small)
    print(report, end="\n\n")
    tiny = GPT(dim=96)

    speeds = {}
    for name, model, rate in (("dense", dense, 1e-3), ("codebooks", small, 4e-3), ("smaller dense", tiny, 4e-3)):
        speeds[name] = train(name, model, training, steps, rate)
    converted = rpqfx.rpqify(dense, rpqfx.Policy(codebook_dim=4, codebook_bits=8, sharing="layer"))

    rows = []
    print(f"\n{'model':<28}{'bytes':>12}{'validation loss':>18}{'tokens/s (training)':>22}")
    for name, model, speed in (
        ("dense", dense, speeds["dense"]),
        ("codebooks, from scratch", small, speeds["codebooks"]),
        ("smaller dense", tiny, speeds["smaller dense"]),
        ("dense, converted afterwards", converted, None),
    ):
        size = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
        told = "-" if speed is None else f"{speed:,.0f}"
        loss = validate(model, validation)
        rows.append({"model": name, "bytes": size, "loss": loss, "tokens_a_second": speed})
        print(f"{name:<28}{size:>12,}{loss:>18.3f}{told:>22}", flush=True)

    with tempfile.TemporaryDirectory() as folder:  # what was saved computes the same, to the last bit
        path = Path(folder) / "small.rpq"
        rpqfx.save(small, path)
        again = rpqfx.load(path, GPT)
        sample = validation[None, :CONTEXT]
        assert torch.equal(again(sample), small(sample))
        print(f"\nsaved in {path.stat().st_size:,} bytes; loaded again with identical outputs")
    if arguments.json:
        print(json.dumps({"steps": steps, "batch": BATCH, "context": CONTEXT, "rows": rows}))


if __name__ == "__main__":
    main()
