"""``rpqfx generate`` goes on with a text."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from rpqfx.errors import InputError
from rpqfx.integrations.command_line.models import is_language_model, open_model, tokenizer_of


def run(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Generates tokens.

    Args:
        given: What was typed.

    Returns:
        The text and what it took, as values and as text.

    Raises:
        InputError: If the model is no language model, or the prompt is empty.
    """
    tokenizer = tokenizer_of(given.tokenizer or given.path)
    model = open_model(given.path)
    if not is_language_model(model):
        raise InputError(f"{given.path} holds a {type(model).__name__}, which generates no text from a text alone")
    inputs = tokenizer(given.prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError("the prompt has no tokens; give a text")
    torch.manual_seed(given.seed)
    start = time.perf_counter()
    found = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=given.tokens,
        do_sample=given.sample, pad_token_id=_padding(model),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    new = found[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(found[0], skip_special_tokens=True)
    return {"prompt": given.prompt, "text": text, "new_tokens": len(new), "seconds": seconds}, text


def _padding(model: Any) -> Any:
    """What ends a text that is done before others; here there are no others, but generate wants to know."""
    config = model.generation_config
    end = config.eos_token_id
    first = end[0] if isinstance(end, list) else end
    return config.pad_token_id if config.pad_token_id is not None else first
