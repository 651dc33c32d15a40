"""Train the quickstart's model in several processes, dense and with its weights quantized.

For each it prints the loss (the same as in one process), the bytes that each process sends in a step and the bytes of
Parameters and codes that it holds. It runs on processors, with gloo.

    torchrun --nproc-per-node 2 examples/05_distributed.py             # a few minutes on two cores
    torchrun --nproc-per-node 2 examples/05_distributed.py --steps 3   # a minute
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's own, where numpy is not installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.fsdp import fully_shard as shard_dense  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import rpqfx  # noqa: E402
from rpqfx.distributed import broadcast_codes, check_same_codes, fully_shard  # noqa: E402

HERE = Path(__file__).parent
POLICY = rpqfx.Policy.from_scratch(codebook_dim=64, codebook_bits=6, signs=True)


def quickstart() -> Any:
    """The first example, as a module."""
    spec = importlib.util.spec_from_file_location("quickstart", HERE / "01_quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIRST = quickstart()


class Traffic(TorchDispatchMode):
    """Counts the bytes that collectives are called with; those of DistributedDataParallel come by its hook."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":  # an output first, then what this process puts into it
            found = [t for t in args[:2] if isinstance(t, Tensor)]
            self.bytes += max((t.nbytes for t in found), default=0)
        return func(*args, **(kwargs or {}))

    def hook(self, state, bucket):  # torch reads annotations here, and expects no strings
        self.bytes += bucket.buffer().nbytes
        mean = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])


def held(model: nn.Module) -> int:
    """Bytes of Parameters and buffers in this process."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def codebook_bytes(model: nn.Module) -> int:
    """Bytes of codebooks alone, each once, which gradients are held against."""
    books = (module.codebooks for module in model.modules() if isinstance(module, rpqfx.nn.RPQWeight))
    return sum(book.nbytes for book in {id(book): book for book in books}.values())


def distributed(model: nn.Module, how: str, traffic: Traffic) -> nn.Module:
    small = any(isinstance(m, rpqfx.nn.RPQWeight) for m in model.modules())
    if how == "DDP":
        if small:
            check_same_codes(broadcast_codes(model))
        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(None, traffic.hook)
        return parallel
    if how == "FSDP2":
        for part in (*model.blocks, model):
            (fully_shard if small else shard_dense)(part)
    return model


def train(model: nn.Module, how: str, data: Tensor, steps: int, rate: float) -> dict[str, Any]:
    """Trains a model on batches that the processes share, or each on all of them."""
    traffic, split = Traffic(), how != "one process"
    model = distributed(model, how, traffic)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    draw = torch.Generator().manual_seed(0)
    sent = 0
    for _ in range(steps):
        first = torch.randint(len(data) - FIRST.CONTEXT - 1, (FIRST.BATCH, 1), generator=draw)
        windows = data[first + torch.arange(FIRST.CONTEXT + 1)]
        if split:
            windows = windows.chunk(dist.get_world_size())[dist.get_rank()]
        optimiser.zero_grad()
        before = traffic.bytes
        with traffic:
            loss = FIRST.loss_of(model, windows)
            loss.backward()
        optimiser.step()
        sent = traffic.bytes - before
        mean = loss.detach().clone()
        if split:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
    return {"loss": mean.item(), "sent_bytes": sent, "held_bytes": held(model)}


def opt_block() -> list[dict[str, Any]]:
    """Bytes of the gradients of one block of OPT-6.7B, which is built on the meta device and not run."""
    with torch.device("meta"):
        dense = nn.ModuleDict({name: nn.Linear(4096, 4096) for name in "qkvo"})
        dense.update({"up": nn.Linear(4096, 16384), "down": nn.Linear(16384, 4096)})
        small = rpqfx.rpqify(dense, rpqfx.Policy.from_scratch(codebook_dim=64, codebook_bits=8))
    models = {"dense": dense, "codebooks": small}
    return [
        {"kind": kind, "sent_bytes": sum(p.nbytes for p in m.parameters()), "codebook_bytes": codebook_bytes(m)}
        for kind, m in models.items()
    ]


def tell(text: str) -> None:
    if not dist.get_rank():
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", action="store_true", help="write examples/results/distributed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data, _ = FIRST.read_text()
    torch.manual_seed(0)
    dense = FIRST.GPT()
    kinds = {"dense": (dense, 1e-3), "codebooks": (rpqfx.rpqify(dense, POLICY), 4e-3)}
    rows = []
    for kind, (model, rate) in kinds.items():
        for how in ("one process", "DDP", "FSDP2"):
            again = FIRST.GPT()
            again = again if kind == "dense" else rpqfx.rpqify(again, POLICY)
            again.load_state_dict(model.state_dict())
            own = codebook_bytes(again)  # before a part of them is another process's
            found = {"kind": kind, "how": how, **train(again, how, data, arguments.steps, rate), "codebook_bytes": own}
            rows.append(found)
            tell(
                f"{kind:<10}{how:<12} loss {found['loss']:.4f}, sent for each step {found['sent_bytes']:>11,} bytes, "
                f"held by each process {found['held_bytes']:>11,} bytes, codebooks {own:,} bytes"
            )
    block, ranks = opt_block(), dist.get_world_size()
    tell("a block of OPT-6.7B: " + ", ".join(f"{row['kind']} {row['sent_bytes']:,} bytes" for row in block) + " a step")
    if arguments.results and not dist.get_rank():
        sys.path.insert(0, str(HERE / "bench"))
        import results

        command = f"torchrun --nproc-per-node {ranks} examples/05_distributed.py --steps {arguments.steps} --results"
        figures = {"ranks": ranks, "steps": arguments.steps, "seed": 0, "rows": rows, "block": block}
        results.write("distributed", command, figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
