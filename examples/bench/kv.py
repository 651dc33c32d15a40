"""The KV cache of a language model in codebooks, beside float16, a 2-bit scalar cache and vqllm's recipe.

    RPQFX_EVALKIT=<kit> python examples/bench/kv.py [--tokens 8192] [--only 2]
    python examples/bench/kv.py --decode

Perplexity is of WikiText-2 in windows of 1,024 tokens, every token predicted from what a cache would have held when it
came. Bytes are those of a cache that was filled with 4,096 tokens. ``--decode`` times tokens instead
(``kv_decode.py``), and writes ``examples/results/kv-decode.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kv_decode
import torch
from convert_models import kit, load_smollm2
from torch import Tensor, nn

import rpqfx
from rpqfx.kv import CodebookCache, KVPolicy, attentions

CONTEXT = 4096
OURS = {
    "5.5 x": KVPolicy(bits_per_value=1.7, window=128),
    "4": KVPolicy(bits_per_value=4, window=128),
    "3": KVPolicy(bits_per_value=3, window=128),
    "2": KVPolicy(bits_per_value=2, window=128),
    "2, keys after rotation": KVPolicy(bits_per_value=2, window=128, keys="after"),
    "2, keys after rotation, heads apart": KVPolicy(bits_per_value=2, window=128, keys="after", joint=False),
    "1": KVPolicy(bits_per_value=1, window=128),
}
VQLLM = KVPolicy(
    bits_per_value=2.75, window=0, sinks=0, chunk=8, keys="before", codebook_dim=32, codebook_size=2048,
    transform=False, strided=True, normalize=True, beam=1,
)  # fmt: skip


class ScalarCoder(nn.Module):
    """Two bits a number, as KIVI (Liu et al., 2402.02750): least and largest of 32 numbers are 0 and 3.

    Args:
        heads: Of keys and values.
        dim: Of a head.
        across: Whether the 32 are tokens of a channel (keys) or channels of a token (values).
    """

    def __init__(self, heads: int, dim: int, across: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.across = heads, dim, across

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, H, T, D]`` after coding, and no loss."""
        lines = (x.transpose(-1, -2) if self.across else x).contiguous()
        fill = -lines.shape[-1] % 32
        last = lines[..., -1:].expand(*lines.shape[:-1], fill)
        groups = torch.cat([lines, last], -1).unflatten(-1, (-1, 32))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((high - low) / 3).half().to(x.dtype).clamp_min(1e-8)
        low = low.half().to(x.dtype)
        made = (((groups - low) / step).round().clamp(0, 3) * step + low).flatten(-2)[..., : lines.shape[-1]]
        return made.transpose(-1, -2) if self.across else made, x.new_zeros(())


@dataclass
class Row:
    """One line of the table."""

    who: str
    perplexity: float
    sizes: dict[str, int]
    note: str = ""


def cache_bytes(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """What a cache takes that holds so many tokens."""
    cache = CodebookCache.for_model(model, torch.float16)
    with torch.no_grad():
        for piece in ids[None].split(512, 1):
            model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache.nbytes()


def rows(tokens: int, only: list[str] | None) -> Any:
    """Every line of the table, one by one."""
    loaded = load_smollm2()
    model = loaded.model
    _, tokenizer = kit().load_smollm2()
    calibration = [{**batch, "use_cache": False} for batch in loaded.calibration(16)]
    ids = kit().lm_tokens(tokenizer, kit().DATA / "wikitext2_valid.txt")[:CONTEXT]
    config = model.config
    each = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

    def evaluate(net: nn.Module) -> float:
        return kit().eval_ppl(net, tokenizer, max_tokens=tokens)

    yield Row("float16", evaluate(model), {"all": each * CONTEXT}, "perplexity of the float32 model")

    def quantised(policy: KVPolicy) -> tuple[nn.Module, float]:
        began = time.perf_counter()
        small = rpqfx.quantize_kv(model, policy, calibration=calibration, progress=False)
        return small, (time.perf_counter() - began) / 60

    if not only or "scalar" in only:
        small, _ = quantised(KVPolicy(bits_per_value=1, window=128, sinks=0, chunk=32, keys="after"))
        for core in attentions(small).values():
            core.keys = ScalarCoder(core.keys.heads, core.keys.dim, across=True)
            core.values = ScalarCoder(core.values.heads, core.values.dim, across=False)
        coded = (CONTEXT - 128) // 32 * 32
        sizes = {"codes": each // 8 * coded, "scales": each // 2 * 2 * 2 // 32 * coded}
        sizes["window"] = each * (CONTEXT - coded)
        yield Row("2-bit scalar, as KIVI, window 128", evaluate(small), sizes, "bytes computed")
    if not only or "vqllm" in only:
        small, minutes = quantised(VQLLM)
        sizes = cache_bytes(small, ids)
        for core in attentions(small).values():
            core.policy = dataclasses.replace(core.policy, chunk=8)  # at most seven tokens as they are
        yield Row("vqllm's recipe", evaluate(small), sizes, f"fitted in {minutes:.1f} min")
    for name, policy in OURS.items():
        if not only or name in only:
            small, minutes = quantised(policy)
            note = f"{policy.bits_per_value} bits, window {policy.window}; fitted in {minutes:.1f} min"
            yield Row(f"**rpqfx, {name}**", evaluate(small), cache_bytes(small, ids), note)


def print_table(tokens: int, only: list[str] | None) -> None:
    """Prints line after line."""
    print(
        f"| cache at {CONTEXT} tokens | perplexity | | MB | smaller | codes, scales, window, positions, codebooks | |"
    )
    print("|---|---|---|---|---|---|---|")
    dense = whole = 0.0
    for row in rows(tokens, only):
        total = sum(row.sizes.values())
        dense, whole = dense or row.perplexity, whole or total
        parts = ", ".join(f"{row.sizes.get(k, 0) / 1e6:.2f}" for k in ("codes", "scales", "window", "positions"))
        parts += f", {row.sizes.get('codebooks', 0) / 1e6:.2f}"
        print(
            f"| {row.who} | {row.perplexity:.3f} | {row.perplexity / dense:.4f} x | {total / 1e6:.2f} | "
            f"{whole / total:.2f} x | {parts if 'codes' in row.sizes else '-'} | {row.note} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="of the evaluation")
    parser.add_argument("--only", nargs="*", help=f"rows: scalar, vqllm, {', '.join(OURS)}")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--file", type=Path, help="converted SmolLM2 whose tokens --decode times, too")
    parser.add_argument("--threads", type=int, default=2)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    print(f"torch {torch.__version__}, {wanted.threads} threads, {sys.platform}\n")
    if wanted.decode:
        kv_decode.run(wanted.file)
    else:
        print_table(wanted.tokens, wanted.only)


if __name__ == "__main__":
    main()
