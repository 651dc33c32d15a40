"""How ``kv.py --decode`` times a token on codes: attention of one layer, and a whole model with the kit.

Attention is of SmolLM2-135M's shape, three heads of keys and nine of queries with 64 channels, at 32,768 tokens of
context. A step goes through several layers, as it does in a model, so that none finds its tokens in the processor's
cache. The model is SmolLM2-135M at 8,192 tokens, dense or in a converted file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx.kv import CodebookCache, KVPolicy

LONG, LAYERS, RUNS = 32_768, 8, 20
CONTEXT, STEPS = 8192, 20


class _Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of three heads of keys and nine of queries."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def layers() -> list[dict[str, Any]]:
    """Times a step of attention: milliseconds and megabytes of one layer, for each kind of cache."""
    numbers = torch.Generator().manual_seed(0)
    mix = torch.randn(192, 192, generator=numbers) * 0.97 ** torch.arange(192)[:, None]

    def tokens(count: int, heads: int) -> Tensor:
        x = torch.randn(1, count, heads * 64, generator=numbers) @ torch.block_diag(*[mix] * (heads // 3))
        return x.view(1, count, heads, 64).transpose(1, 2).contiguous() / 8

    q = tokens(1, 9)
    held = [(tokens(LONG, 3), tokens(LONG, 3)) for _ in range(LAYERS)]
    size = (held[0][0].nbytes + held[0][1].nbytes) / 1e6
    cases: dict[str, tuple[list[Callable[[], Tensor]], float]] = {
        "float32 SDPA, enable_gqa": (
            [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in held], size,
        ),
        "float32 SDPA, queries as rows": (
            [lambda k=k, v=v: F.scaled_dot_product_attention(q.view(1, 3, 3, 64), k, v) for k, v in held], size,
        ),
    }  # fmt: skip
    calibration = [(tokens(1024, 9), tokens(1024, 3), tokens(1024, 3)) for _ in range(4)]
    angles = torch.arange(LONG)[:, None] * 10_000.0 ** (-torch.arange(32) / 32)
    rope = tuple(torch.cat([turn, turn], 1) for turn in (angles.cos(), angles.sin()))
    for bits, keys in ((4, "after"), (2, "after"), (1, "after"), (2, "before")):
        for joint in (True, False):
            policy = KVPolicy(bits_per_value=bits, window=128, keys="after", joint=joint)
            small = rpqfx.quantize_kv(_Layer(), policy, calibration=calibration, progress=False)
            stores = [next(iter(CodebookCache(small).stores.values())) for _ in held]
            for store, (k, v) in zip(stores, held, strict=True):
                for some in range(0, LONG, 4096):
                    part = slice(some, some + 4096)
                    turns = None if keys == "after" else (rope[0][part], rope[1][part])
                    store.append(k[:, :, part], v[:, :, part], turns)
            name = f"{bits} bits, keys {keys} rotation, heads {'together' if joint else 'apart'}"
            steps: list[Callable[[], Tensor]] = [lambda store=store: store.attend(q) for store in stores]  # type: ignore[misc]
            cases[name] = (steps, sum(stores[0].nbytes().values()) / 1e6)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(RUNS + 3):
        for name, (steps, _) in cases.items():
            began = time.perf_counter()
            with torch.no_grad():
                for step in steps:
                    step()
            times[name].append((time.perf_counter() - began) * 1e3 / LAYERS)
    return [
        {"cache": name, "ms": statistics.median(times[name][3:]), "megabytes": size}
        for name, (_, size) in cases.items()
    ]


def model(file: Path) -> list[dict[str, Any]]:
    """Times a token of SmolLM2-135M at 8,192 tokens, eager, with a dense cache and with one of two bits.

    Args:
        file: The converted model.
    """
    from convert_models import kit, load_smollm2
    from transformers import AutoConfig, DynamicCache, LlamaForCausalLM

    config = AutoConfig.from_pretrained(kit().MODELS / "smollm2" / "hf")
    small = rpqfx.load(file, lambda: LlamaForCausalLM(config)).eval()
    calibration = [{**batch, "use_cache": False} for batch in load_smollm2().calibration(4)]
    ids = torch.arange(CONTEXT + STEPS)[None] % 40_000 + 100
    made: list[dict[str, Any]] = []
    for name, keys in (("float32", ""), ("2 bits", "after"), ("2 bits", "before")):
        one = small
        if keys:
            policy = KVPolicy(bits_per_value=2, window=128, keys=keys)  # type: ignore[arg-type]
            one = rpqfx.quantize_kv(small, policy, calibration=calibration, progress=False)
        cache = CodebookCache.for_model(one) if keys else DynamicCache(config=config)
        taken = []
        with torch.inference_mode():
            for part in ids[:, :CONTEXT].split(512, 1):
                one(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for at in range(CONTEXT, CONTEXT + STEPS):
                began = time.perf_counter()
                one(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                taken.append((time.perf_counter() - began) * 1e3)
        if isinstance(cache, CodebookCache):
            size = sum(cache.nbytes().values())
        else:
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        rotation = f", keys {keys} rotation" if keys else ""
        made.append({"cache": name + rotation, "ms": statistics.median(taken), "megabytes": size / 1e6})
        print(made[-1], flush=True)
    return made


def run(file: Path | None) -> None:
    """Times what can be timed, prints it, and writes ``examples/results/kv-decode.json``.

    Args:
        file: A converted model, or None for attention alone.
    """
    figures: dict[str, Any] = {"seed": 0, "tokens": LONG, "layers": layers()}
    for row in figures["layers"]:
        print(row, flush=True)
    command = "python examples/bench/kv.py --decode"
    if file is not None:
        figures |= {"context": CONTEXT, "model": model(file)}
        command += " --file <file>"
    results.write("kv-decode", command, figures)
