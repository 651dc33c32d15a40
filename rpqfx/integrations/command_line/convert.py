"""``rpqfx convert`` quantizes the weights of a folder of transformers, and says what that cost."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpqfx.conversion.convert import convert
from rpqfx.errors import InputError
from rpqfx.integrations.command_line import texts
from rpqfx.integrations.command_line.models import class_of, is_language_model, open_model, tokenizer_of, transformers
from rpqfx.integrations.command_line.source import weight_files
from rpqfx.policies.policy import Policy
from rpqfx.reporting.report import Report, report
from rpqfx.reporting.tables import size

_WORK, _DRAFT = ".partial", ".unfinished"  # what folders of unfinished work are called, beside the result
_BATCHES, _LENGTH, _EVALUATE = 16, 1024, 8192


@dataclass(frozen=True)
class _Data:
    """The inputs and settings of a conversion.

    Args:
        batches: Of calibration; None where there is none.
        measure: What the quality of a model is; None where it is not measured.
        quality: What is measured, in words.
    """

    batches: list[Any] | None
    measure: Callable[[Any], float] | None
    quality: str


def run(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Converts a folder; the same call goes on with what was interrupted.

    Args:
        given: What was typed.

    Returns:
        What came of it, as values and as text.

    Raises:
        RPQError: If it cannot be converted, or the data are not fit.
        OSError: If a file cannot be read or written.
    """
    out: Path = given.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; name a new folder with --out, or remove it")
    _check_options(given)
    class_of(given.folder)
    policy = Policy.pretrained(given.bits_per_weight, embedding_bits=given.embedding_bits)
    if given.calibration is None:
        small, quality, data = _while_loading(given, policy)
    else:
        small, quality, data = _calibrated(given, policy)
    _write(small, given.folder, out)
    shutil.rmtree(_work(out), ignore_errors=True)
    return _told(given, report(small), quality, data.quality)


def _calibrated(given: argparse.Namespace, policy: Policy) -> tuple[Any, dict[str, float], _Data]:
    """Converts with calibration, the dense model in memory."""
    model = open_model(given.folder, dtype=given.dtype)
    data = _data(given, model)
    quality = {} if data.measure is None else {"before": data.measure(model)}
    small = convert(
        model, policy, data.batches, checkpoint=_work(given.out), seed=given.seed, inplace=True,
        progress=not given.quiet,
    )  # fmt: skip
    if data.measure is not None:
        quality["after"] = data.measure(small)
    return small, quality, data


def _while_loading(given: argparse.Namespace, policy: Policy) -> tuple[Any, dict[str, float], _Data]:
    """Converts without data, each weight as it is read; the dense model is in memory only to be measured."""
    data, quality = _Data(None, None, ""), {}
    if given.held_back is not None:
        model = open_model(given.folder, dtype=given.dtype)
        data = _data(given, model)
        assert data.measure is not None
        quality["before"] = data.measure(model)
        del model
    from rpqfx.integrations.config import RPQConfig

    if not given.quiet:
        transformers().logging.enable_progress_bar()
    config = RPQConfig(policy=policy, seed=given.seed, checkpoint=_work(given.out))
    small = open_model(given.folder, dtype=given.dtype, quantization_config=config)
    if data.measure is not None:
        quality["after"] = data.measure(small)
    return small, quality, data


def _data(given: argparse.Namespace, model: Any) -> _Data:
    """Reads what a model is calibrated on and measured with."""
    if given.calibration is not None and given.calibration.is_dir():
        processor = transformers().AutoImageProcessor.from_pretrained(str(given.folder))
        return _Data(texts.images(given.calibration, processor, given.batches or _BATCHES), None, "")
    tokenizer = tokenizer_of(given.folder)
    length = given.length or _LENGTH
    length = min(length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or length)
    language = is_language_model(model)
    if given.held_back is not None and not language:
        raise InputError(f"--held-back measures perplexity, and a {type(model).__name__} is no language model")
    tokens = None if given.calibration is None else texts.tokens_of(tokenizer, texts.read_text(given.calibration))
    if given.held_back is not None:
        held = texts.tokens_of(tokenizer, texts.read_text(given.held_back))[: given.evaluate or _EVALUATE]
    elif language and tokens is not None:
        tokens, held = texts.split(tokens, given.evaluate or _EVALUATE)
    else:
        held = torch.empty(0, dtype=torch.long)
    batches = None if tokens is None else texts.windows(tokens, length, given.batches or _BATCHES)
    if not language:
        return _Data(batches, None, "")
    if len(held) < 2:
        raise InputError(f"the text that is held back has {len(held)} tokens, and perplexity takes 2 at least")
    return _Data(batches, _Perplexity(held, length), f"perplexity of {len(held):,} tokens that were held back")


@dataclass(frozen=True)
class _Perplexity:
    tokens: Tensor
    length: int

    def __call__(self, model: Any) -> float:
        return texts.perplexity(model, self.tokens, self.length)


def _check_options(given: argparse.Namespace) -> None:
    """Refuses options that would change nothing."""
    images = given.calibration is not None and given.calibration.is_dir()
    for option, needless, why in (
        ("--batches", given.calibration is None, "nothing is calibrated on without --calibration"),
        ("--length", images or given.calibration is None is given.held_back, "no text was given"),
        ("--evaluate", images or given.calibration is None is given.held_back, "no text was given"),
        ("--held-back", images, "images are calibrated on, and perplexity is of language models"),
    ):
        if needless and getattr(given, option.removeprefix("--").replace("-", "_")) is not None:
            raise InputError(f"{option} would change nothing: {why}; leave it out")


def _work(out: Path) -> Path:
    return out.with_name(out.name + _WORK)


def _write(small: Any, folder: str, out: Path) -> None:
    """Writes the result, and beside it what else the folder has: its tokenizer, its image processor, its card."""
    draft = out.with_name(out.name + _DRAFT)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".md", ".model", ".txt") and "index" not in path.name:
            shutil.copyfile(path, draft / path.name)
    small.save_pretrained(draft)
    os.replace(draft, out)


def _told(
    given: argparse.Namespace, made: Report, quality: dict[str, float], measured: str
) -> tuple[dict[str, Any], str]:  # fmt: skip
    before, after = (
        sum(Path(file).stat().st_size for file in weight_files(Path(f))) for f in (given.folder, given.out)
    )
    line = f"rpqfx generate {shlex.quote(str(given.out))} --prompt 'Once upon a time'"
    values = {
        "folder": str(given.out), "bits_per_weight": made.bits_per_weight, "bytes": after, "bytes_before": before,
        "report": made.to_dict(),
    }  # fmt: skip
    lines = [str(made), f"weight files: {size(before)} before, {size(after)} after"]
    if quality:
        values |= {"perplexity_before": quality["before"], "perplexity": quality["after"]}
        lines.append(f"{measured}: {quality['before']:.3f} before, {quality['after']:.3f} after")
        values["run"] = line
        lines.append(f"to run it: {line}")
    else:
        values["run"] = f"rpqfx report {shlex.quote(str(given.out))}"
        lines.append(f"to see it: {values['run']}")
    return values, "\n".join(lines)
