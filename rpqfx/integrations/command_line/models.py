"""Models and tokenizers of transformers, opened from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpqfx.errors import FormatError


def transformers() -> Any:
    """Returns transformers, which then draws no progress bars.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import transformers as found
    except ImportError as error:
        raise ImportError("this needs transformers 5, the extra: pip install 'rpqfx[transformers]'") from error
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def class_of(folder: str | Path) -> Any:
    """Returns the class of the model in a folder.

    Args:
        folder: Of a model of transformers, dense or quantized.

    Raises:
        OSError: If there is no such folder, or no config in it.
        FormatError: If the config names no class that transformers has.
    """
    place = Path(folder)
    if not place.is_dir():
        what = "is a file, and this takes a folder of save_pretrained" if place.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}")
    config = place / "config.json"
    if not config.exists():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a model of transformers")
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [None]
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{config} is no config: {error}") from error
    found = getattr(transformers(), str(names[0]), None)
    if found is None:
        raise FormatError(
            f"{config} names the class {names[0]}, which transformers {transformers().__version__} has not; open such "
            "a model in Python, and use rpqfx.rpqify and save_pretrained there"
        )
    return found


def open_model(folder: str | Path, *, dtype: Any = None, quantization_config: Any = None) -> Any:
    """Returns the model of a folder, in eval mode.

    Args:
        folder: Dense or quantized.
        dtype: Of the weights; left out, that of the folder.
        quantization_config: Says how weights are quantized while they are loaded; None for as they are.

    Raises:
        OSError: As ``class_of``.
        FormatError: Likewise, or if the weights are damaged.
    """
    options = {"dtype": dtype, "quantization_config": quantization_config}
    given = {name: value for name, value in options.items() if value is not None}
    return class_of(folder).from_pretrained(str(folder), **given).eval()


def is_language_model(model: Any) -> bool:
    """Returns whether a model gives each token of a text a probability, given those before.

    Args:
        model: Of transformers.
    """
    names = transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    kind = getattr(type(model), "_rpq_base", type(model))
    return kind.__name__ in names


def tokenizer_of(folder: str | Path) -> Any:
    """Returns the tokenizer of a folder.

    Args:
        folder: With the files of a tokenizer.

    Raises:
        FormatError: If there is none.
    """
    if not any((Path(folder) / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise FormatError(f"{folder} has no tokenizer; save one there with tokenizer.save_pretrained({str(folder)!r})")
    return transformers().AutoTokenizer.from_pretrained(str(folder))
