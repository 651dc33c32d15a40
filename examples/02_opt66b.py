"""An OPT-66B that fits: built on the meta device, rewritten into codebooks, and generating on this machine's CPU.

    pip install 'rpqfx[examples]' && python examples/02_opt66b.py

The weights are random, so the tokens mean nothing: this shows memory and speed. Beside them stands what RPQ-pytorch
does at each use of a weight, gathering it from its codebooks and multiplying, measured for one decoder layer and
scaled to the model. Each of the three runs is a process of its own, so that its peak of memory is its own too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's own, where numpy is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import rpqfx  # noqa: E402
from rpqfx import codebook  # noqa: E402
from rpqfx.nn import RPQWeight  # noqa: E402

PARTS = ("float32", "bfloat16", "gather")
THREADS, PROMPT, WARM_UP, TURNS = 2, 8, 2, 7
LAYERS, WIDE, INNER, HEADS, WORDS = 64, 9216, 36864, 72, 50272  # facebook/opt-66b
LINEARS = ((WIDE, WIDE, 4), (WIDE, INNER, 1), (INNER, WIDE, 1))  # in, out, how many in a decoder layer


def build(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> nn.Module:
    """transformers' OPT at the configuration of facebook/opt-66b, on the meta device: 66 billion weights, no memory."""
    try:
        from transformers import OPTConfig, OPTForCausalLM
    except ImportError as error:
        raise SystemExit(f"this example needs the extra: pip install 'rpqfx[examples]' ({error})") from None
    config = OPTConfig(
        vocab_size=WORDS, hidden_size=WIDE, num_hidden_layers=layers, ffn_dim=INNER, num_attention_heads=HEADS,
        max_position_embeddings=2048, word_embed_proj_dim=WIDE,
    )  # fmt: skip
    with torch.device("meta"):
        return OPTForCausalLM(config).to(dtype).eval()


def measure(dtype: torch.dtype, tokens: int = 16, layers: int = LAYERS, split: str = "auto") -> dict[str, Any]:
    """Rewrites, materialises, generates.

    Args:
        dtype: Of codebooks and activations.
        tokens: How many to generate, the first one with the prompt.
        layers: Decoder layers.
        split: Along what the vectors of linear layers lie, as in a policy.

    Returns:
        Seconds of every stage and per token, bytes of the model and per token, and the peak of resident memory.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    start = time.perf_counter()
    policy = rpqfx.Policy.from_scratch(num_subvectors="heads", split=split)
    model = rpqfx.rpqify(build(dtype, layers), policy, inplace=True)
    rewritten = time.perf_counter()
    rpqfx.materialize(model)
    materialised = time.perf_counter()
    ids, times = generate(model, tokens)
    peak = peak_bytes()  # before the roofline, whose buffer is not the model's
    read = read_bytes(model)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "ids": ids,
        "rewrite_s": rewritten - start,
        "materialize_s": materialised - rewritten,
        "first_token_s": times[0],
        "token_s": statistics.median(times[1:]),
        "peak_bytes": peak,
        "model_bytes": rpqfx.report(model).after,
        "token_bytes": read,
        "roofline_s": read / read_bandwidth(),
    }


class Clock:
    """A streamer of transformers' ``generate``: notes when each token is there."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(time.perf_counter())  # the prompt first, then token by token
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def generate(model: nn.Module, tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of one sequence, with a cache, and the seconds that each took; the first reads the prompt."""
    prompt = torch.randint(4, WORDS, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    clock = Clock()
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, use_cache=True, **options)
    assert len(clock.ids) == PROMPT + tokens and clock.ids[:PROMPT] == prompt[0].tolist()
    return clock.ids[PROMPT:], [after - before for before, after in pairwise(clock.seen)]


def read_bytes(model: nn.Module) -> int:
    """Bytes that one token has to read: codebooks and codes of the linear layers and, tied to the embedding, the head.

    Everything else (biases, norms, one row of each embedding) is not counted: a thousandth of it.
    """
    linear = {id(m.weight_rpq): m.weight_rpq for m in model.modules() if isinstance(m, rpqfx.nn.RPQLinear)}
    return sum(held.codebooks.nbytes + held.codes.nbytes for held in linear.values())


def read_bandwidth() -> float:
    """Bytes a second that a sum over a buffer larger than any cache reads, the best of a few."""
    buffer = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return buffer.nbytes / min(seconds)


def peak_bytes() -> int:
    """The largest resident memory of this process so far, by the kernel's two accounts of it (Linux)."""
    status = Path("/proc/self/status").read_text()
    high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * max(int(high.split()[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@torch.no_grad()
def measure_gather() -> dict[str, Any]:
    """Gather-then-linear: each weight of one decoder layer expanded by torch's own operators, then multiplied.

    One row of input, float32. The layer's seconds are the sum of its six linears', each a median of runs taken in
    turns; the head's are those of a 9216 x 9216 layer, by its elements.

    Returns:
        Seconds of the layer and, scaled, of a token; and the peak of resident memory.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    runs: list[Callable[[], Tensor]] = []
    for wide, out, _ in LINEARS:
        held = RPQWeight(rpqfx.CodebookSpec.make(out, wide, num_subvectors=HEADS, codebook_bits=8))
        x = torch.randn(1, wide)
        runs.append(lambda held=held, x=x: F.linear(x, codebook.expand(held.codebooks, held.codes)))
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(WARM_UP + TURNS):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn >= WARM_UP:
                found.append(time.perf_counter() - start)
    seconds = [statistics.median(found) for found in times]
    layer = sum(count * second for (*_, count), second in zip(LINEARS, seconds, strict=True))
    head = seconds[0] * WORDS / WIDE
    return {
        "linears_s": dict(zip((f"{wide} x {out}" for wide, out, _ in LINEARS), seconds, strict=True)),
        "layer_s": layer,
        "head_s": head,
        "token_s": LAYERS * layer + head,
        "peak_bytes": peak_bytes(),
    }


def in_process(part: str, tokens: int) -> dict[str, Any]:
    """One of the three runs, in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--tokens", str(tokens), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # nothing is to be downloaded
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"the run of {part} ended with status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="one run only, in this process")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON, one line")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("this example reads its peak of memory from /proc, which is Linux's")
    if arguments.part == "gather":
        print(json.dumps(measure_gather()))
    elif arguments.part is not None:
        print(json.dumps(measure(getattr(torch, arguments.part), arguments.tokens)))
    elif arguments.json:
        print(json.dumps({part: in_process(part, arguments.tokens) for part in PARTS}))
    else:
        build(layers=1)  # says at once what is missing
        show(arguments.tokens)


def show(tokens: int) -> None:
    print("OPT-66B with RANDOM weights, one codebook per attention head: this shows memory and speed, not language.")
    print(f"{THREADS} threads, one sequence, {PROMPT} tokens of prompt, {tokens} new ones, greedy, with a cache.\n")
    found = {}
    for part in ("float32", "bfloat16"):
        run = found[part] = in_process(part, tokens)
        print(f"{part}")
        print(f"  rewritten on the meta device  {run['rewrite_s']:8.1f} s")
        print(f"  materialised                  {run['materialize_s']:8.1f} s")
        print(f"  first token, with the prompt  {run['first_token_s']:8.2f} s")
        print(f"  each further token            {run['token_s']:8.3f} s, the median of {tokens - 1}")
        print(f"  its roofline                  {run['roofline_s']:8.3f} s, to read {run['token_bytes'] / 1e9:.2f} GB")
        print(f"  peak of resident memory       {run['peak_bytes'] / 1e9:8.2f} GB")
        print(f"  the model's tensors           {run['model_bytes'] / 1e9:8.2f} GB\n", flush=True)
    gather = in_process("gather", tokens)
    print("gather, then linear, float32 (one decoder layer measured, medians)")
    for name, seconds in gather["linears_s"].items():
        print(f"  {name:<30}{seconds:8.3f} s")
    print(f"  one decoder layer             {gather['layer_s']:8.3f} s")
    print(
        f"  each token, SCALED            {gather['token_s']:8.1f} s: {LAYERS} layers and the head, without attention"
    )
    print(f"  peak of resident memory       {gather['peak_bytes'] / 1e9:8.2f} GB for the one layer\n")
    for part, run in found.items():
        print(f"{part} is {gather['token_s'] / run['token_s']:.0f} times as fast as gathering in float32")


if __name__ == "__main__":
    main()
