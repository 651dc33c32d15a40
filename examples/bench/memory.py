"""Peak memory of training steps (forward, backward, AdamW), dense and rewritten, block by block.

    python examples/bench/memory.py             # two threads; each row in a process of its own

Two measures, since each misses something. *Allocated* is the largest sum of bytes that torch's CPU allocator had handed
out, as its profiler reports every allocation and release: exact, also for buffers made and dropped inside one operator
or a compiled kernel, and each byte can be told apart; it misses what other threads and libraries take. *RSS* is the
growth of the resident set that the operating system saw (VmHWM, Linux only): all of that, and the pages that malloc
keeps after their release.

At the moment of the allocated peak, "state" is parameters, gradients, Adam's moments, codes and the block's input;
"activations" is what the forward left for the backward, copies of weights in autocast's dtype among it; "temporary" is
the rest, such as bins, tables and gradients on their way.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx.ops.cpu import build as cpu_kernels

MB = 1e6
STEPS = 3
POLICY = rpqfx.Policy.from_scratch(codebook_dim=64, codebook_bits=8)


class Shape(NamedTuple):
    """A transformer block and its batch."""

    dim: int
    heads: int
    mlp: int
    tokens: int
    batch: int
    causal: bool


SHAPES = {
    "ViT-giant": Shape(1408, 16, 6144, 257, 8, False),
    "GPT-2": Shape(768, 12, 3072, 512, 2, True),
    "GPT-2 medium": Shape(1024, 16, 4096, 512, 2, True),
    "OPT-6.7B": Shape(4096, 32, 16384, 512, 2, True),
}


class Block(nn.Module):
    """Attention and an MLP, each after a norm and added to its input."""

    def __init__(self, dim: int, heads: int, mlp: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Peak(NamedTuple):
    """Bytes at the moment when most are allocated, and the growth of the resident set."""

    state: int
    activations: int
    temporary: int
    resident: int | None

    @property
    def allocated(self) -> int:
        return self.state + self.activations + self.temporary


# -------------------------------------------------------------------------------------------- what was allocated when


def allocations(events: list) -> Iterator[tuple[int, int]]:
    """``(address, bytes)`` of every allocation (above zero) and release (below) in a profile's tree, in time."""
    found, rest = [], list(events)
    while rest:
        event = rest.pop()
        rest += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return ((address, size) for _, address, size in sorted(found, key=lambda x: x[0]))


def split_peak(profile: object, before: int, grads: list[int]) -> tuple[int, int, int]:
    """State, activations and temporary bytes at the peak of one profiled step.

    Args:
        profile: Of the step, with memory. The forward ends with an allocation of ``MARK`` bytes.
        before: Bytes of state that were there before.
        grads: Addresses of the gradients that are there afterwards.
    """
    live: dict[int, tuple[int, int]] = {}  # an address is used again and again, so each use has a number
    total = peak = 0
    at_peak: dict[int, int] = {}
    kept: set[int] = set()
    for number, (address, size) in enumerate(allocations(profile.kineto_results.experimental_event_tree())):
        if size == MARK:
            kept = {which for which, _ in live.values()}
        if size > 0:
            live[address] = (number, size)
            total += size
        elif address in live:
            total -= live.pop(address)[1]
        if total > peak:
            peak, at_peak = total, dict(live.values())
    assert kept, "the end of the forward was not found"
    state = {live[address][0] for address in grads}
    in_state = sum(size for which, size in at_peak.items() if which in state)
    activations = sum(size for which, size in at_peak.items() if which in kept - state)
    return before + in_state, activations, peak - in_state - activations


# ------------------------------------------------------------------------------------------------------- one process


MARK = 123_456  # bytes that nothing else has


def resident(peak: bool) -> int | None:
    """The resident set's bytes, now or at its peak; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(lines["VmHWM" if peak else "VmRSS"].split()[0])


def warm_up() -> None:
    """A step of something small, so that the modules and libraries of all that follows are there already."""
    cpu_kernels.ready()
    small = rpqfx.rpqify(nn.Sequential(nn.Linear(256, 512)), POLICY)
    optimizer = torch.optim.AdamW(small.parameters())
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            small(torch.randn(64, 256)).float().sum().backward()
    optimizer.step()


def measure(name: str, rewritten: bool, half: bool) -> Peak:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    shape = SHAPES[name]
    warm_up()
    start = resident(peak=False)

    with torch.device("meta"):  # no dense weight is made on the way to the rewritten model
        block = Block(shape.dim, shape.heads, shape.mlp, shape.causal)
    block = rpqfx.materialize(rpqfx.rpqify(block, POLICY) if rewritten else block)
    optimizer = torch.optim.AdamW(block.parameters())
    x = torch.randn(shape.batch, shape.tokens, shape.dim, requires_grad=True)
    upstream = torch.randn(x.shape) / x.numel()  # the gradient that the next block would hand back

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = block(x)
        torch.empty(MARK, dtype=torch.uint8)
        y.backward(upstream)
        optimizer.step()

    for _ in range(STEPS):
        step()
        optimizer.zero_grad()
        x.grad = None
    gc.collect()
    seen = resident(peak=True)
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    before = sum(t.untyped_storage().nbytes() for t in (x, upstream, *block.parameters(), *block.buffers(), *moments))
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        step()
    grads = [p.grad.untyped_storage().data_ptr() for p in (x, *block.parameters()) if p.grad is not None]
    parts = split_peak(profile, before, grads)
    return Peak(*parts, None if seen is None or start is None else seen - start)


# --------------------------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(SHAPES)}; all if left out")
    names = parser.parse_args().names or list(SHAPES)
    for name in names:
        shape = SHAPES[name]
        print(f"{name}: {shape.dim} wide, MLP {shape.mlp}, {shape.batch} x {shape.tokens} tokens")
    print("\n| block, MB | | state | activations | temporary | allocated | | RSS | |")
    print("|---|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name in names:
        for half in (False, True):
            dense: Peak | None = None
            for rewritten in (False, True):
                with ProcessPoolExecutor(1, mp_context=context) as process:
                    found = process.submit(measure, name, rewritten, half).result()
                dense = dense or found
                numbers = [f"{part / MB:,.0f}" for part in (*found[:3], found.allocated)]
                ratio = f"{found.allocated / dense.allocated:.2f}"
                rss, rss_ratio = "", ""
                if found.resident and dense.resident:
                    rss, rss_ratio = f"{found.resident / MB:,.0f}", f"{found.resident / dense.resident:.2f}"
                what = f"{name}, {'bf16 autocast' if half else 'float32'} | {'codebooks' if rewritten else 'dense'}"
                print(f"| {what} | {' | '.join(numbers)} | {ratio} | {rss} | {rss_ratio} |", flush=True)


if __name__ == "__main__":
    main()
