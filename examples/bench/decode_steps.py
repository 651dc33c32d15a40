"""How ``decode.py`` times a model on torch: single tokens, eager, compiled and as a package, and a prompt."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rpqfx

STEPS, BEFORE, PROMPT = 40, 64, 512


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention whose heads of queries stay beside the head of keys that they share, where there is one token.

    Transformers does the same with one token, but not in compiled code, where it copies keys and values for each head.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, tokens_, dim = query.shape
    if tokens_ > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = query.reshape(batch, key.shape[1], -1, dim)
    y = nn.functional.scaled_dot_product_attention(packed, key, value, attention_mask, scale=options["scaling"])
    return y.reshape(batch, 1, heads, dim), None


class Step(nn.Module):
    """One token of a model with a static cache, as a function of tensors alone."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("one token", attention)
        AttentionMaskInterface.register("one token", sdpa_mask)
        model.set_attn_implementation("one token")
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        ids = tokens()[:, :BEFORE].to(next(model.parameters()).device)
        model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        for number, layer in enumerate(self.cache.layers):  # so that an exported graph has them as its state
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name}_{number}", value, persistent=False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        for layer in self.cache.layers:  # where tokens go is given: a package of AOTInductor counts on wrongly itself
            layer.cumulative_length.copy_(position[0, 0])
        made = self.model(ids, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return made.logits


def tokens() -> Tensor:
    """Returns the same ids for every row."""
    return torch.arange(100, 100 + PROMPT)[None]


def eager(model: nn.Module) -> float:
    """Returns the median seconds of a token, with the cache that ``generate`` uses."""
    from transformers import DynamicCache

    ids, taken = tokens(), []
    cache = DynamicCache(config=model.config)
    model(ids[:, :BEFORE], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for at in range(BEFORE, BEFORE + STEPS):
        start = time.perf_counter()
        model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def compiled(model: nn.Module) -> float:
    """The same of one graph a token, with a static cache."""
    step = Step(model, 256)
    options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # which take milliseconds a token
    options |= rpqfx.inductor_options()
    return by_steps(torch.compile(step, fullgraph=True, dynamic=False, options=options))[0]


def packaged(model: nn.Module) -> tuple[float, float]:
    """The same of a package of AOTInductor, and how far its last logits are from the model's own, relatively."""
    step = Step(model, 256)
    program = torch.export.export(step, (tokens()[:, :1], torch.tensor([[BEFORE]])), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/step.pt2", inductor_configs=rpqfx.inductor_options()
        )
        taken, logits = by_steps(torch._inductor.aoti_load_package(path))
    whole = model(tokens()[:, : BEFORE + STEPS], use_cache=False, logits_to_keep=1).logits
    return taken, float((logits - whole).norm() / whole.norm())


def by_steps(step: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
    """Returns the median seconds of a token, without the first five, and the logits of the last."""
    ids, taken = tokens(), []
    for at in range(BEFORE, BEFORE + STEPS):
        position = torch.tensor([[at]])
        start = time.perf_counter()
        logits = step(ids[:, at : at + 1], position)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[5:]), logits


def prompt(model: nn.Module) -> float:
    """Returns the seconds of a prompt, the better of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        model(tokens(), use_cache=False, logits_to_keep=1)
        taken.append(time.perf_counter() - start)
    return min(taken)
