"""``rpqfx bench`` measures tokens a second and memory."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from rpqfx.errors import InputError, RPQError
from rpqfx.integrations.command_line.models import class_of, is_language_model, open_model
from rpqfx.reporting.tables import size


def run(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures a model, and a dense one in a process of its own.

    Args:
        given: What was typed.

    Returns:
        The figures, as values and as text.

    Raises:
        InputError: If the model is no language model, or takes fewer tokens.
        RPQError: If the dense model could not be measured.
    """
    found = _measured(given)
    lines = [_line(found)]
    if given.dense is not None:
        found["dense"] = _beside(given)
        faster = found["tokens_per_second"] / found["dense"]["tokens_per_second"]
        smaller = found["dense"]["tensor_bytes"] / found["tensor_bytes"]
        lines += [_line(found["dense"]), f"{faster:.2f} times the dense speed, tensors {smaller:.2f} times smaller"]
    return found, "\n".join(lines)


def _measured(given: argparse.Namespace) -> dict[str, Any]:
    class_of(given.path)  # imports what the model needs, which is neither its loading nor its memory
    before = _memory("VmRSS")
    start = time.perf_counter()
    model = open_model(given.path)
    loading = time.perf_counter() - start
    if not is_language_model(model):
        raise InputError(f"{given.path} holds a {type(model).__name__}; bench measures tokens of language models")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = given.prompt_tokens + given.tokens
    if longest is not None and wanted > longest:
        raise InputError(
            f"{given.path} takes {longest} tokens, and {wanted} were asked for; give less --prompt-tokens or --tokens"
        )
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, given.prompt_tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    steps = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names of arguments change; these are right for all versions
        model(input_ids=ids, use_cache=True)  # compiles and loads what the first call does
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True)
        prompt = time.perf_counter() - start
        for _ in range(given.tokens):
            token = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - start)
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    peak = _memory("VmHWM")
    return {
        "path": str(given.path), "load_seconds": loading, "tokens_per_second": 1 / statistics.median(steps),
        "prompt_tokens_per_second": given.prompt_tokens / prompt, "tensor_bytes": sum(held.values()),
        "peak_bytes": None if peak is None or before is None else peak - before, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _beside(given: argparse.Namespace) -> dict[str, Any]:
    """The same of the dense model, where nothing of this process is in the way."""
    command = [
        sys.executable, "-m", "rpqfx", "bench", given.dense, "--json", "--tokens", str(given.tokens),
        "--prompt-tokens", str(given.prompt_tokens),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RPQError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{given.dense} failed")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def _line(found: dict[str, Any]) -> str:
    grown = "" if found["peak_bytes"] is None else f", process grown by {size(found['peak_bytes'])} at most"
    return (
        f"{found['path']}: {found['tokens_per_second']:.1f} tokens a second, prompt "
        f"{found['prompt_tokens_per_second']:.0f} tokens a second, tensors {size(found['tensor_bytes'])}{grown}, "
        f"loaded in {found['load_seconds']:.2f} s, {found['threads']} threads"
    )


def _memory(name: str) -> int | None:
    """Bytes of the process, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else 1024 * int(found)
