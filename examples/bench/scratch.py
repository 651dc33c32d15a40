"""Training from scratch at equal bytes: learned codes beside smaller dense models, in float32, int8 and int4.

    python examples/bench/scratch.py text

Task ``text``: a byte-level GPT on the sources of Python's standard library; every tenth file is held back, and every
twentieth is for choosing learning rates. Each row is the same GPT, of the largest width whose saved bytes do not
exceed those of the first row of codebooks: all rows take the same number of steps on batches of the same seeds. The
learning rate of each row is the best of a small grid on one seed. int8 and int4 are quantization-aware: rows of a
matrix are rounded to multiples of a factor of their own, straight through (Jacob et al., 1712.05877). The last row is
the dense model of the codebooks' width, converted after training. Writes ``examples/results/scratch-TASK.json`` after
every run, and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rpqfx
from rpqfx import Policy, Recoding

WIDTH, LAYERS, HEAD, LENGTH, BATCH, STEPS, HELD_BACK = 128, 2, 32, 64, 16, 400, 40
RATES, SEEDS = (2e-3, 4e-3), (0, 1, 2)
CODES = {"codebook_dim": 2, "codebook_bits": 4, "sharing": "layer"}
NAME = "scratch-text"


class Block(nn.Module):
    """Attention, then a feed-forward block, each around a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = next(count for count in range(max(1, width // HEAD), 0, -1) if width % count == 0)
        each = self.qkv(self.norm1(x)).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*each, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A byte-level language model; its table and head are not tied, so that low rows of tables cost what they do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for table in (self.table, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Text(NamedTuple):
    """Bytes to train on, to choose learning rates by, and to report."""

    train: Tensor
    choose: Tensor
    test: Tensor


def text() -> Text:
    """The sources of Python's standard library, file by file."""
    parts: tuple[list[bytes], ...] = ([], [], [])
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        part = 2 if number % 10 == 0 else 1 if number % 20 == 5 else 0
        parts[part].append(path.read_bytes())
    return Text(*[torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts])


def batches(source: Tensor, seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(source) - LENGTH - 1, (BATCH, 1), generator=generator)
        ids = source[starts + torch.arange(LENGTH + 1)].long()
        yield ids[:, :-1], ids[:, 1:]


def loss_of(model: nn.Module, ids: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), following.flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, source: Tensor) -> float:
    return statistics.fmean(float(loss_of(model, *batch)) for batch in batches(source, 99, HELD_BACK))


class Rounded(nn.Module):
    """Rows of a matrix as multiples of a factor, straight through."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        factor = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-8) / self.most
        rounded = (weight.detach() / factor).round().clamp(-self.most, self.most) * factor
        return weight + (rounded - weight.detach())


class LowRank(nn.Module):
    """A linear layer as two thin ones."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)))


def integer(width: int, bits: int) -> nn.Module:
    model = GPT(width)
    for _, layer in matrices(model):
        parametrize.register_parametrization(layer, "weight", Rounded(bits))
    return model


def low_rank(width: int) -> nn.Module:
    model = GPT(width)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LowRank(getattr(block, name), width // 4))
    return model


def in_codebooks(**options: Any) -> nn.Module:
    return rpqfx.rpqify(GPT(WIDTH), Policy.from_scratch(**{**CODES, **options}))


def floats(model: nn.Module, bits: int = 32) -> int:
    """Bytes of a dense model whose matrices have so many bits a number, and a float16 factor a row below 32."""
    held = dict(matrices(model))
    total = 4 * sum(p.numel() for p in model.parameters())
    for layer in held.values() if bits < 32 else ():
        rows, columns = (layer.parametrizations.weight.original if bits < 32 else layer.weight).shape
        total += rows * math.ceil(columns * bits / 8) + 2 * rows - 4 * rows * columns
    return total


def saved(model: nn.Module) -> int:
    """Bytes of the tensors of a saved file: codes are packed."""
    report = rpqfx.report(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        rpqfx.save(model, path)
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert report.sites
        return path.stat().st_size - 8 - length


class Row(NamedTuple):
    """One way to spend the bytes."""

    build: Callable[[int], nn.Module]
    size: Callable[[nn.Module], int]
    recipe: str | None = None
    sizes: tuple[int, ...] = ()
    """What ``build`` may be given, rising; the largest that fits is taken. Empty for a row of fixed size."""


ROWS = {
    "codebooks, latent": Row(lambda _: in_codebooks(), saved, "latent"),
    "codebooks, sketch": Row(lambda _: in_codebooks(codebook_dim=4, stages=2), saved, "sketch"),
    "codebooks, random": Row(
        lambda bits: in_codebooks(codebook_dim=32, codebook_bits=bits, sharing="own"), saved, sizes=tuple(range(1, 9))
    ),
    "dense float32": Row(GPT, floats, sizes=tuple(range(8, WIDTH, 4))),
    "dense int8": Row(lambda width: integer(width, 8), lambda m: floats(m, 8), sizes=tuple(range(8, 2 * WIDTH, 4))),
    "dense int4": Row(lambda width: integer(width, 4), lambda m: floats(m, 4), sizes=tuple(range(8, 2 * WIDTH, 4))),
    "low rank float32": Row(low_rank, floats, sizes=tuple(range(8, WIDTH, 4))),
    "dense float32, full width": Row(lambda _: GPT(WIDTH), floats),
}  # fmt: skip
CONVERTED = "dense, converted"


def size_for(row: Row, most: int) -> int:
    fitting = [size for size in row.sizes if row.size(row.build(size)) <= most]
    return max(fitting, default=0)


def run(row: Row, size: int, rate: float, seed: int, source: Text) -> dict[str, Any]:
    """Trains one model, and returns what it reached."""
    torch.manual_seed(seed)
    model = row.build(size)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    recode = None
    if row.recipe is not None:
        recode = Recoding(model, optimizer, steps=STEPS, recipe=row.recipe, seed=seed)  # type: ignore[arg-type]
    warm = max(1, STEPS // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    start, curve = time.perf_counter(), []
    for number, batch in enumerate(batches(source.train, seed, STEPS)):
        loss = loss_of(model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if recode is not None:
            recode.step()
        if number % (STEPS // 20) == 0:
            curve.append(round(float(loss.detach()), 4))
    if recode is not None:
        recode.finish()
    found = {
        "size": size, "rate": rate, "seed": seed, "bytes": row.size(model), "choose": mean_loss(model, source.choose),
        "test": mean_loss(model, source.test), "seconds": round(time.perf_counter() - start, 1), "curve": curve,
    }  # fmt: skip
    if row is ROWS["dense float32, full width"]:
        policy = Policy(**CODES, init="fit")
        small = rpqfx.rpqify(model, policy)
        found[CONVERTED] = {"test": mean_loss(small, source.test), "bytes": saved(small)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["text"])
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = text()
    path = results.FOLDER / f"{NAME}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def done(name: str, rate: float, seed: int, size: int) -> dict[str, Any]:
        known = {"row": name, "rate": rate, "seed": seed}
        found = next((one for one in runs if known.items() <= one.items()), None)
        if found is None:
            found = {"row": name, **run(ROWS[name], size, rate, seed, source)}
            runs.append(found)
            sizes = {"width": WIDTH, "layers": LAYERS, "length": LENGTH, "batch": BATCH, "steps": STEPS, **CODES}
            command = "python examples/bench/scratch.py text"
            results.write(NAME, command, {"rates": RATES, "sizes": sizes, "train": len(source.train), "runs": runs})
            print(f"{name}, rate {rate}, seed {seed}: {found['test']:.4f}, {found['bytes']:,} bytes", flush=True)
        return found

    most = saved(in_codebooks())
    for name in args.rows:
        size = size_for(ROWS[name], most) if ROWS[name].sizes else WIDTH
        tried = [done(name, rate, SEEDS[0], size) for rate in RATES]
        best = min(tried, key=lambda one: one["choose"])["rate"]
        for seed in SEEDS[1 : args.seeds]:
            done(name, best, seed, size)


if __name__ == "__main__":
    main()
