"""The three pretrained models of ``convert.py``: loading, sites, evaluation, calibration.

They come from an evaluation kit: a folder with ``evalkit.py``, named by the environment variable ``RPQFX_EVALKIT``.
The kit has no training text, so the language model is calibrated on the part of WikiText-2 valid that starts at the
first article after the 65,536 tokens which are evaluated: never evaluated here, yet of the same kind as what is. The
sentence encoder, evaluated on other text, is calibrated on phrases of the whole file.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EVALUATED_TOKENS = 65_536
_WINDOW = 1024
Batch = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it.

    Args:
        model: Dense, float32, in eval mode.
        sites: Names of the modules whose weights are to be rewritten.
        evaluate: Metric by name; ``quick`` leaves out what takes minutes.
        calibration: That many batches to call the model with: a tensor, or keyword arguments.
    """

    model: nn.Module
    sites: list[str]
    evaluate: Callable[..., dict[str, float]]
    calibration: Callable[[int], list[Batch]]

    def matrices(self) -> dict[str, Tensor]:
        """The sites' weights as ``[N, D]``; filters are flattened to ``[N, C * taps]``."""
        return {name: self.model.get_parameter(f"{name}.weight").detach().flatten(1) for name in self.sites}

    def with_weights(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the model with other weights, ``[N, D]`` by the names of sites."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, weight in weights.items():
                dense = model.get_parameter(f"{name}.weight")
                dense.copy_(weight.reshape(dense.shape))
        return model


@dataclass(frozen=True)
class Subject:
    """A model of the table.

    Args:
        name: For the table.
        origin: What its weights are, to be said beside each figure.
        targets: Stored bits a weight.
        load: Reads it; needs the kit.
    """

    name: str
    origin: str
    targets: tuple[float, ...]
    load: Callable[[], Loaded]


@functools.cache
def kit() -> Any:
    """The module ``evalkit`` of the folder that ``RPQFX_EVALKIT`` names.

    Raises:
        SystemExit: The variable is not set, or the folder has no ``evalkit.py``.
    """
    path = Path(os.environ.get("RPQFX_EVALKIT", "")) / "evalkit.py"
    if "RPQFX_EVALKIT" not in os.environ or not path.exists():
        raise SystemExit("RPQFX_EVALKIT has to name a folder with evalkit.py")
    spec = importlib.util.spec_from_file_location("evalkit", path)
    assert spec is not None and spec.loader is not None
    threads = torch.get_num_threads()
    module = importlib.util.module_from_spec(spec)
    sys.modules["evalkit"] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(threads)  # the kit sets its own
    return module


def load_smollm2() -> Loaded:
    model, tokenizer = kit().load_smollm2()

    def evaluate(net: nn.Module, *, quick: bool = False) -> dict[str, float]:
        sizes = (8192,) if quick else (8192, EVALUATED_TOKENS)
        return {f"perplexity {n // 1024}k": kit().eval_ppl(net, tokenizer, max_tokens=n) for n in sizes}

    def calibration(batches: int) -> list[Batch]:
        ids = tokenizer(held_out_text(tokenizer), add_special_tokens=False, verbose=False).input_ids
        windows = torch.tensor(ids[: len(ids) // _WINDOW * _WINDOW]).view(-1, 1, _WINDOW)
        return [{"input_ids": windows[i]} for i in _spread(len(windows), batches)]

    return Loaded(model, _sites(model, "model.layers."), evaluate, calibration)


def load_minilm() -> Loaded:
    model = kit().load_minilm()

    def evaluate(net: nn.Module, *, quick: bool = False) -> dict[str, float]:
        return {"Spearman": kit().eval_sts(net)}

    def calibration(batches: int, size: int = 32) -> list[Batch]:
        available = phrases()
        taken = [available[i] for i in _spread(len(available), batches * size)]
        groups = [taken[i : i + size] for i in range(0, len(taken), size)]
        return [dict(model.tokenizer(g, padding=True, truncation=True, return_tensors="pt")) for g in groups]

    return Loaded(model, _sites(model, "bert.encoder."), evaluate, calibration)


def load_resnet20() -> Loaded:
    model = kit().load_resnet_cifar(20)

    def evaluate(net: nn.Module, *, quick: bool = False) -> dict[str, float]:
        return {"accuracy": kit().eval_cifar(net)}

    def calibration(batches: int, size: int = 250) -> list[Batch]:
        images, _ = kit().cifar("train10k")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the file is by class
        return list(images[order[: batches * size]].split(size))

    return Loaded(model, _sites(model, ""), evaluate, calibration)


def augmented(batches: int, *, size: int = 250, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """CIFAR-10 training images as the ResNets saw them: 4 pixels of black around, a random crop, a random flip.

    Args:
        batches: How many.
        size: Images a batch.
        seed: Of the order, crops and flips.

    Yields:
        Images ``[size, 3, 32, 32]`` and labels ``[size]``.
    """
    images, labels = kit().cifar("train10k")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (kit().CIFAR_MEAN, kit().CIFAR_STD))
    padded = (nn.functional.pad(images * std + mean, (4, 4, 4, 4)) - mean) / std
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        taken = torch.randint(len(images), (size,), generator=generator)
        corners = torch.randint(9, (2, size, 1), generator=generator) + torch.arange(32)
        flip = torch.rand(size, 1, generator=generator) < 0.5
        rows, columns = corners[0], torch.where(flip, corners[1].flip(1), corners[1])
        at = (taken[:, None, None], slice(None), rows[:, :, None], columns[:, None, :])
        yield padded[at].permute(0, 3, 1, 2).contiguous(), labels[taken]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> nn.Module:
    """Running means and variances again, as plain averages over the batches; changes the model in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for images, _ in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@functools.cache
def phrases() -> list[str]:
    """Sentences and clauses of 4 to 30 words of WikiText-2 valid, as they are written by people, in no order.

    The kit has no other split of STS-B, whose sentences are short and plain; these are no part of it. The file is
    tokenised ("red @-@ tipped", "( 24 in )") and has "<unk>" in place of rare words: spaces are put back, and what has
    lost a word is left out. A model that never saw such text has other activations on it.
    """
    text = (kit().DATA / "wikitext2_valid.txt").read_text(encoding="utf-8")
    found: list[str] = []
    for sentence in re.split(r"(?<= [.?!]) |\n", text):
        if "=" in sentence:  # a heading
            continue
        found.append(sentence)
        if len(sentence.split()) > 12:
            found += re.split(r" [,;:] ", sentence)
    whole = [plain(phrase) for phrase in found if "<unk>" not in phrase]
    kept = sorted({phrase for phrase in whole if 4 <= len(phrase.split()) <= 30})
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    return [kept[i] for i in order]


def plain(phrase: str) -> str:
    """Text without the spaces that WikiText's tokeniser put in."""
    for pattern, there in (
        (r" @(.)@ ", r"\1"),
        (r"\( (.*?) \)", r"(\1)"),
        (r'" (.*?) "', r'"\1"'),
        (r" ([,.;:?!%]|'s\b|n't\b)", r"\1"),
    ):
        phrase = re.sub(pattern, there, phrase)
    return phrase.strip()


def held_out_text(tokenizer: Any) -> str:
    """WikiText-2 valid from the first article after the evaluated tokens on."""
    text = (kit().DATA / "wikitext2_valid.txt").read_text(encoding="utf-8")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    end = encoded["offset_mapping"][EVALUATED_TOKENS][0]
    article = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE).search(text, end)
    assert article is not None
    return text[article.start() :]


def _sites(model: nn.Module, prefix: str) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d)
    return [n for n, module in model.named_modules() if n.startswith(prefix) and isinstance(module, kinds)]


def _spread(available: int, wanted: int) -> list[int]:
    """Evenly over what there is."""
    if wanted > available:
        raise ValueError(f"there are {available} to calibrate with, not {wanted}")
    return [i * available // wanted for i in range(wanted)]


SUBJECTS: list[Subject] = [
    Subject("SmolLM2-135M", "Linears from a 16-level grid (GGUF Q4_1)", (4.0, 3.0, 2.1), load_smollm2),
    Subject("MiniLM", "native float32", (3.1, 2.1), load_minilm),
    Subject("ResNet-20", "native float32", (2.1, 1.05), load_resnet20),
]
