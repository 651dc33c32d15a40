"""How long rewriting takes: models of more and more layers, as ``tests/contracts/test_time.py`` counts their calls.

    python examples/bench/rewriting.py

Each model is rewritten once to warm up. Processor seconds of this process; nothing is fitted, codebooks are drawn.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy

POLICIES = {
    "own codebooks": Policy(codebook_bits=4, codebook_dim=16, init="random"),
    "by role": Policy(codebook_bits=4, codebook_dim=16, init="random", sharing="role"),
    "budget": Policy.budget(ratio=0.3, init="random"),
}


class Block(nn.Module):
    """Four layers and a forward of its own, which is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


def blocks(layers: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(layers // 4)))


def on_meta(layers: int) -> nn.Module:
    with torch.device("meta"):
        return blocks(layers)


def seconds(model: nn.Module, policy: Policy) -> float:
    start = time.process_time()
    rpqfx.rpqify(model, policy)
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print("| layers | policy | seconds | on the meta device |\n|---|---|---|---|")
    for name, policy in POLICIES.items():
        seconds(blocks(20), policy), seconds(on_meta(20), policy)
        for layers in (250, 500, 1000):
            taken = [seconds(build(layers), policy) for build in (blocks, on_meta)]
            print(f"| {layers} | {name} | {taken[0]:.2f} | {taken[1]:.2f} |")


if __name__ == "__main__":
    main()
