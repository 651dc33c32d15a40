"""What each way of using many devices takes, dense and quantized: memory of a device, and bytes it sends in a step.

    python examples/bench/ranks.py

Nothing is run: the tensors of OPT-6.7B and OPT-66B are counted on the meta device, as ``Policy.from_scratch`` makes
them. Training is in float32 with AdamW: 16 bytes for each number that is trained (itself, its gradient, two moments)
and the codes. Collectives go around in a ring, so a device sends ``(ranks - 1) / ranks`` of what it hands to one that
gathers or scatters, and twice that of a sum; ``examples/05_distributed.py`` measures on a small model what is handed to
them. Activations, and what a layer needs while it runs, are not counted. Writes ``examples/results/ranks.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import results
import torch
from torch import nn

import rpqfx

MODELS = {"OPT-6.7B": (32, 4096), "OPT-66B": (64, 9216)}  # layers and width
TOKENS = 4096  # of a step, for each device (for each group of devices under tensor parallelism)
TENSOR_PARALLEL = 8  # devices of a group
RANKS = (8, 64)
VECTORS = {
    "q",
    "k",
    "v",
    "up",
    "tokens",
    "positions",
}  # what is split across vectors: columns of layers, rows of tables
TRAINED_BYTES = 16  # of a float32 number: itself, its gradient, two moments


def opt(layers: int, width: int) -> nn.Module:
    """Returns the weights of an OPT model, which is not run, on the meta device."""

    def block() -> nn.Module:
        parts: dict[str, nn.Module] = {name: nn.Linear(width, width) for name in "qkvo"}
        parts |= {"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}
        return nn.ModuleDict(parts | {"first": nn.LayerNorm(width), "second": nn.LayerNorm(width)})

    with torch.device("meta"):
        tables = {"tokens": nn.Embedding(50272, width), "positions": nn.Embedding(2050, width)}
        blocks = nn.ModuleList([block() for _ in range(layers)])
        return nn.ModuleDict({**tables, "blocks": blocks, "norm": nn.LayerNorm(width)})


@dataclass(frozen=True)
class Size:
    """Numbers that are trained (those of them that tensor parallelism leaves whole), bytes of codes, layers, width."""

    trained: int
    whole: int
    code_bytes: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: nn.Module, layers: int, width: int) -> Size:
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        whole = sum(
            count for name, count in trained.items() if name.endswith("codebooks") and set(name.split(".")) & VECTORS
        )
        return cls(sum(trained.values()), whole, sum(b.nbytes for b in model.buffers()), layers, width)

    @property
    def state_bytes(self) -> int:
        """Bytes of all that training keeps."""
        return TRAINED_BYTES * self.trained + self.code_bytes

    def ddp(self, ranks: int) -> dict[str, float]:
        """All of it on every device; gradients go around once in a ring."""
        return {"held_bytes": self.state_bytes, "sent_bytes": 2 * (ranks - 1) / ranks * 4 * self.trained}

    def fsdp(self, ranks: int) -> dict[str, float]:
        """A share on every device; weights and codes are gathered twice, gradients reduced once."""
        moved = 2 * (4 * self.trained + self.code_bytes) + 4 * self.trained
        return {"held_bytes": self.state_bytes / ranks, "sent_bytes": (ranks - 1) / ranks * moved}

    def tensor_parallel(self, ranks: int) -> dict[str, float]:
        """A share within each group of devices, over which four activations a layer are added up, gradients between.

        A split across vectors leaves codebooks whole; their gradients are added up in the group.
        """
        group, groups = min(ranks, TENSOR_PARALLEL), ranks // min(ranks, TENSOR_PARALLEL)
        own = self.whole + (self.trained - self.whole) / group
        activations = 4 * self.layers * TOKENS * self.width * 4
        sent = 2 * (group - 1) / group * (activations + 4 * self.whole) + 2 * (groups - 1) / groups * 4 * own
        return {"held_bytes": TRAINED_BYTES * own + self.code_bytes / group, "sent_bytes": sent}


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, shape in MODELS.items():
        dense = opt(*shape)
        sizes = {"dense": Size.of(dense, *shape)}
        sizes["codebooks"] = Size.of(
            rpqfx.rpqify(dense, rpqfx.Policy.from_scratch(codebook_dim=64, codebook_bits=8)), *shape
        )
        for ranks in RANKS:
            for kind, size in sizes.items():
                ways = {"DDP": size.ddp(ranks), "FSDP2": size.fsdp(ranks), "TP": size.tensor_parallel(ranks)}
                rows.append({"model": name, "ranks": ranks, "kind": kind, "trained": size.trained, **ways})
                print(rows[-1], flush=True)
    figures = {"tokens": TOKENS, "tensor_parallel": TENSOR_PARALLEL, "rows": rows}
    results.write("ranks", "python examples/bench/ranks.py", figures)


if __name__ == "__main__":
    main()
