"""transformers: one or two models of each type, from tiny configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zoo_transformers_pairs
import zoo_transformers_sound
from zoo_models import Call, Model, tokens
from zoo_tiny import VOCAB, auto
from zoo_transformers_decoders import DECODERS
from zoo_transformers_encoders import BOTH, ENCODERS
from zoo_transformers_images import IMAGES


def models() -> list[Model]:
    """The entries."""
    found = [_entry(name, "CausalLM", options, _ids) for name, options in DECODERS]
    found += [_entry(name, "MaskedLM", options, _ids) for name, options in ENCODERS]
    found += [_entry(name, "Seq2SeqLM", options, _two) for name, options in BOTH]
    for name, task, size, options in IMAGES:
        found.append(_entry(name, task, options, _pixels(size)))
    return [*found, *zoo_transformers_sound.models(), *zoo_transformers_pairs.models()]


def _entry(name: str, task: str, options: dict[str, Any], call: Callable[[], Call]) -> Model:
    suffix = " seq2seq" if (name, task) in (("prophetnet", "Seq2SeqLM"),) else ""
    return Model(f"transformers/{name}{suffix}", name, auto(name, task, options), call)


def _ids() -> Call:
    return Call((), {"input_ids": tokens(VOCAB)})


def _two() -> Call:
    return Call((), {"input_ids": tokens(VOCAB), "decoder_input_ids": tokens(VOCAB, 7)})


def _pixels(size: int) -> Callable[[], Call]:
    return lambda: Call((), {"pixel_values": torch.randn(2, 3, size, size)})
