"""Routers and routed blocks: time and memory, with the colt5-attention package beside them where it is installed.

    pip install colt5-attention                 # optional; what is compared with
    python examples/bench/routing.py            # two threads
    python examples/bench/routing.py router block --threads 1
    python examples/bench/routing.py lm --seconds 600 --plot routing.svg

Shapes are those of its README: 2 x 32768 tokens of width 512, of which 1024 are heavy, and cross-attention of 1024
tokens to 131,072 memories. "full" is an ordinary transformer block, its attention by scaled_dot_product_attention. "lm"
trains two byte-level language models on the text in ``pydoc_data`` for equal time: ``routing_lm.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile

from rpqfx.routing import RoutedCrossAttention, RoutedTransformerBlock, coordinate_descent, exact_scores

BATCH, TOKENS, DIM, HEAVY = 2, 32_768, 512, 1024
MEMORIES = 131_072
ROUTED = {"num_heavy_attn_tokens_q": HEAVY, "num_heavy_attn_tokens_kv": HEAVY, "num_heavy_ff_tokens": HEAVY}
Run = Callable[[], object]


def colt5() -> Any:
    """The package, or None with a line that says how to get it."""
    try:
        import colt5_attention
    except ImportError as error:
        print(f"\nwithout colt5-attention ({error}); pip install colt5-attention puts it beside ours")
        return None
    return colt5_attention


def seconds(runs: dict[str, Run], turns: int) -> dict[str, tuple[float, float]]:
    """Median and least of runs taken in turns, after one of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}


def peak(run: Run) -> int:
    """The largest sum of bytes that torch's allocator had handed out at once during a run, and not before."""
    with profile(profile_memory=True) as found:
        run()
    events, rest = [], list(found.profiler.kineto_results.experimental_event_tree())
    while rest:
        event = rest.pop()
        rest += event.children
        if event.name == "[memory]":
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    level = most = 0
    for _, size in sorted(events):
        level += size
        most = max(most, level)
    return most


def show(title: str, runs: dict[str, Run], turns: int, memory: bool = False) -> None:
    """A table; the last columns are how many times as long each takes as the first, by medians and by the least.

    On a machine that does other work meanwhile, the least says more.
    """
    found = seconds(runs, turns)
    first = next(iter(found))
    peaks = {name: peak(run) for name, run in runs.items()} if memory else {}
    print(f"\n| {title} | median, ms | least, ms |{' peak, MB |' if memory else ''} of the first | by the least |")
    print(f"|---|---|---|{'---|' if memory else ''}---|---|")
    for name, (median, least) in found.items():
        size = f" {peaks[name] / 1e6:.2f} |" if memory else ""
        over = f"{median / found[first][0]:.2f} | {least / found[first][1]:.2f}"
        print(f"| {name} | {1e3 * median:.1f} | {1e3 * least:.1f} |{size} {over} |", flush=True)


def backward(layer: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Run:
    def run() -> None:
        out = layer(*inputs, **options)
        out.backward(torch.ones_like(out))

    return run


def forward(layer: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Run:
    return torch.no_grad()(lambda: layer(*inputs, **options))


# ---------------------------------------------------------------------------------------------------------- the parts


def router(turns: int, theirs: Any) -> None:
    s, eps = torch.randn(BATCH, TOKENS, requires_grad=True), 0.1
    runs: dict[str, Callable[..., Tensor]] = {
        "exact": lambda s: exact_scores(s, HEAVY, eps=eps),
        "coordinate descent, 50 iterations": lambda s: coordinate_descent(s, HEAVY, eps=eps),
        "coordinate descent, 20, eps from 4": lambda s: coordinate_descent(s, HEAVY, eps=eps, n_iters=20, eps_init=4.0),
    }
    if theirs is not None:
        runs["colt5-attention, 50 iterations"] = lambda s: theirs.coor_descent(s, n_iters=50, k=HEAVY, eps=eps)
    show("router forward", {name: forward(run, s) for name, run in runs.items()}, 10 * turns, memory=True)
    show("router forward + backward", {name: backward(run, s) for name, run in runs.items()}, 10 * turns, memory=True)
    wanted = exact_scores(s.detach().double(), HEAVY, eps=eps)
    print("\n| scores | abs(sum - k) / k | furthest from exact in float64 |\n|---|---|---|")
    for name, run in runs.items():
        scores = run(s).detach().double()
        print(f"| {name} | {(scores.sum(-1) - HEAVY).abs().max() / HEAVY:.1e} | {(scores - wanted).abs().max():.1e} |")


def block(turns: int, theirs: Any) -> None:
    x, mask = torch.randn(BATCH, TOKENS, DIM), torch.ones(BATCH, TOKENS, dtype=torch.bool)
    layers: dict[str, nn.Module] = {"rpqfx": RoutedTransformerBlock(DIM, **ROUTED)}
    if theirs is not None:
        layers["colt5-attention"] = theirs.ConditionalRoutedTransformerBlock(DIM, **ROUTED)
        layers["colt5-attention, flash"] = theirs.ConditionalRoutedTransformerBlock(DIM, **ROUTED, use_flash_attn=True)
        if not hasattr(torch.backends.cuda, "sdp_kernel"):  # which its flash attention calls
            del layers["colt5-attention, flash"]
    show("block forward", {name: forward(layer, x, mask=mask) for name, layer in layers.items()}, turns)
    show("block forward + backward", {name: backward(layer, x, mask=mask) for name, layer in layers.items()}, turns)


def full(turns: int, theirs: Any) -> None:
    x = torch.randn(BATCH, TOKENS, DIM)
    plain = nn.TransformerEncoderLayer(DIM, 8, 4 * DIM, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
    layers = {"rpqfx": RoutedTransformerBlock(DIM, **ROUTED), "full block": plain.eval()}
    show("block forward, of a full one", {name: forward(layer, x) for name, layer in layers.items()}, min(turns, 1))


def cross(turns: int, theirs: Any) -> None:
    x, memories = torch.randn(1, 1024, DIM), torch.randn(1, MEMORIES, DIM)
    numbers = {"num_tokens_q": 512, "num_tokens_kv": 1024, "kv_routing_tokens": 2}
    layers: dict[str, nn.Module] = {"rpqfx": RoutedCrossAttention(DIM, **numbers)}
    runs = {name: forward(layer, x, memories) for name, layer in layers.items()}
    both = {name: backward(layer, x, memories) for name, layer in layers.items()}
    if theirs is not None:
        other = Theirs(theirs.ConditionalRoutedCrossAttention(DIM, **numbers))
        runs["colt5-attention"], both["colt5-attention"] = forward(other, x, memories), backward(other, x, memories)
    show("cross-attention forward", runs, turns)
    show("cross-attention forward + backward", both, turns)


class Theirs(nn.Module):
    """Their cross-attention, whose forward in 0.11.2 reads a name it never sets, from the parts it has."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        layer = self.layer
        queries = layer.q_router(x, num_tokens=layer.num_tokens_q)
        keys = layer.kv_router(context, num_tokens=layer.num_tokens_kv)
        made = layer.heavy_attn(
            queries.routed_tokens, context=keys.routed_tokens, mask=keys.routed_mask, normalized_scores_kv=keys.scores
        )
        out = layer.null_q_token.expand_as(x).clone()
        return layer.q_router.route_back(out, made * queries.scores[..., None], queries.indices)


PARTS = {"router": router, "block": block, "full": full, "cross": cross}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join([*PARTS, 'lm'])}; all but lm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3, help="runs of each, of which the median is shown")
    parser.add_argument("--seconds", type=float, default=300, help="of training for each language model")
    parser.add_argument("--plot", help="where the language models' curves go, an SVG file")
    given = parser.parse_args()
    if unknown := set(given.parts) - {*PARTS, "lm"}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join([*PARTS, 'lm'])}")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {given.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    theirs = colt5() if set(given.parts) & {"router", "block", "cross"} else None
    for name in given.parts:
        if name == "lm":
            import routing_lm

            routing_lm.compare(given.seconds, given.plot)
        else:
            PARTS[name](given.turns, theirs)


if __name__ == "__main__":
    main()
