"""Converted encoders and convolutional networks beside the dense ones, eager and compiled, in one run.

    python examples/bench/encoders.py

A sentence encoder of MiniLM's sizes (1 and 32 sentences of 32 tokens) and ResNet-20 (1 and 128 images of 32 x 32), with
random weights and the codebooks that ``Policy.pretrained(3)`` chooses: speed does not depend on what they hold. Two
threads; dense and rewritten take turns, medians. Writes ``examples/results/encoders.json``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import results
import torch
import torch.nn.functional as F
from decode import with_random_codes
from torch import Tensor, nn

import rpqfx

BITS, ROUNDS, LEAST_S = 3.0, 9, 0.05


class Block(nn.Module):
    """Two convolutions around which the input goes (CIFAR's ResNet: He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, self.stride, bias=False) if self.stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet20() -> nn.Module:
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b) for a, b in itertools.pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head).eval()


def minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(**sizes)).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], tuple[int, ...]]] = {
    "MiniLM": (minilm, lambda batch: torch.randint(1, 1000, (batch, 32)), (1, 32)),
    "ResNet-20": (resnet20, lambda batch: torch.randn(batch, 3, 32, 32), (1, 128)),
}


def medians(calls: list[Callable[[], Any]]) -> list[float]:
    """Returns the seconds of each call, taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    counts = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        counts.append(max(1, round(LEAST_S / (time.perf_counter() - start))))
    for _ in range(ROUNDS):
        for call, count, taken in zip(calls, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken.append((time.perf_counter() - start) / count)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    torch.set_num_threads(2)
    rows = []
    for name, (build, make, batches) in CASES.items():
        torch.manual_seed(0)
        dense = build()
        small = with_random_codes(copy.deepcopy(dense), rpqfx.Policy.pretrained(BITS))
        for batch in batches:
            x = make(batch)
            with torch.inference_mode():
                eager = medians([functools.partial(model, x) for model in (dense, small)])
                graphs = [torch.compile(model, dynamic=False) for model in (dense, small)]
                compiled = medians([functools.partial(graph, x) for graph in graphs])
            rows.append(
                {
                    "model": name, "batch": batch, "bits": BITS, "dense_s": eager[0], "ours_s": eager[1],
                    "dense_compiled_s": compiled[0], "ours_compiled_s": compiled[1],
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    results.write("encoders", "python examples/bench/encoders.py", {"seed": 0, "rows": rows})


if __name__ == "__main__":
    main()
