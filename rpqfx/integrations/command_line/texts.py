"""Reads texts and images from files, for calibration and measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpqfx.errors import InputError

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_KEY = "text"


def read_text(path: Path) -> str:
    """Returns the text of a file; of JSON lines, the values of ``text``, a blank line between two.

    Args:
        path: ``.jsonl`` for JSON lines; else the file is a text.

    Raises:
        InputError: If there is no text in it.
        OSError: If it cannot be read.
    """
    try:
        whole = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        whole = "\n\n".join(_entry(path, number, line) for number, line in enumerate(whole.splitlines(), 1) if line)
    if not whole.strip():
        raise InputError(f"{path} holds no text")
    return whole


def _entry(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: no JSON ({error})") from error
    found = value.get(_KEY) if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise InputError(f"{path}, line {number}: expected a text, or an object with one as {_KEY!r}, got {line[:40]}")
    return found


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """Returns the tokens of a text, without those that a tokenizer puts around it.

    Args:
        tokenizer: Of transformers.
        text: Of any length.
    """
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def split(tokens: Tensor, evaluate: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens to calibrate on, and those at the end that are held back: a fifth of all, at most.

    Args:
        tokens: Of the whole text.
        evaluate: How many to hold back at most.
    """
    held = min(evaluate, len(tokens) // 5)
    return tokens[: len(tokens) - held], tokens[len(tokens) - held :]


def windows(tokens: Tensor, length: int, count: int) -> list[dict[str, Tensor]]:
    """Returns batches of one window each, spread evenly over a text.

    Args:
        tokens: Of the text.
        length: Of a window.
        count: How many; fewer where the text has no more.

    Raises:
        InputError: If the text has not one.
    """
    whole = len(tokens) // length
    if not whole:
        raise InputError(
            f"the text to calibrate on has {len(tokens)} tokens, and a batch takes {length}; give more text, or a "
            "smaller --length"
        )
    rows = tokens[: whole * length].view(whole, 1, length)
    some = min(count, whole)
    return [{"input_ids": rows[i * whole // some]} for i in range(some)]


@torch.inference_mode()
def perplexity(model: Any, tokens: Tensor, length: int) -> float:
    """Returns the perplexity of a text, in windows that follow each other.

    Args:
        model: A language model.
        tokens: Of the text, two at least.
        length: Of a window, two at least.
    """
    total, count = 0.0, 0
    for window in tokens.split(length):
        if len(window) < 2:
            continue
        ids = window[None].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def images(folder: Path, processor: Any, batches: int) -> list[Any]:
    """Returns batches of the images of a folder, one after the other in the order of their names.

    Args:
        folder: Of images.
        processor: An image processor of transformers.
        batches: How many; no batch is empty.

    Raises:
        InputError: If there are no images.
        ImportError: If Pillow is not installed.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    if not paths:
        raise InputError(f"{folder} has no images ({', '.join(_IMAGES)})")
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    some = min(batches, len(paths))
    groups: list[Sequence[Path]] = [paths[i * len(paths) // some : (i + 1) * len(paths) // some] for i in range(some)]
    made = []
    for group in groups:
        made.append(dict(processor([Image.open(path).convert("RGB") for path in group], return_tensors="pt")))
    return made
