"""Pretrained models into codebooks, beside the dense models and other quantisers at equal stored bits.

    RPQFX_EVALKIT=<kit> python examples/bench/convert.py [SmolLM2 MiniLM ResNet] [--bits 3.0] [--no-peers]

Prints a table for each model: every row is measured in this run. "Bits" count all that is stored for the rewritten
weights: codes, codebooks, scales. The kit is described in ``convert_models.py``, the peers in ``convert_peers.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from convert_models import SUBJECTS, Batch, Loaded, Subject, augmented, reestimate_batch_norm
from convert_peers import PEERS, Converted, Peer

import rpqfx
from rpqfx.training.distillation import Distillation
from rpqfx.training.parameters import Rates


@dataclass(frozen=True)
class Recipe:
    """How a model is converted and fine-tuned here.

    Args:
        batches: For calibration.
        steps: Of fine-tuning.
        options: Of ``rpqfx.finetune``.
        data: Batches to fine-tune on.
    """

    batches: int
    steps: int
    options: dict[str, Any]
    data: Callable[[Loaded], Any]


def _windows(size: int, together: int) -> Callable[[Loaded], list[Batch]]:
    """The calibration text of the language model in shorter windows, several to a batch."""

    def cut(loaded: Loaded) -> list[Batch]:
        whole = torch.cat([batch["input_ids"] for batch in loaded.calibration(192)], 1)  # type: ignore[index, call-overload]
        rows = whole[0, : whole.shape[1] // size * size].view(-1, size)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        groups = rows[order][: len(rows) // together * together].split(together)
        return [{"input_ids": group, "use_cache": False} for group in groups]  # type: ignore[dict-item]

    return cut


def _images(batches: int) -> Callable[[Loaded], list[Batch]]:
    return lambda loaded: [images for images, _ in augmented(batches, size=128)]


RECIPES = {
    "SmolLM2-135M": Recipe(
        16, 60, {"autocast": torch.bfloat16, "recode": False, "rates": Rates(2e-3, 2e-3)}, _windows(512, 4)
    ),
    "MiniLM": Recipe(48, 200, {"recode": False}, lambda loaded: loaded.calibration(200)),
    "ResNet-20": Recipe(
        16,
        1500,
        {"loss": Distillation(True, 4.0), "norms": "update", "rates": Rates(2e-3, 2e-3, 2e-3, 5e-3)},
        _images(800),
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    who: str
    bits: float | None
    scores: dict[str, float]
    minutes: float
    note: str = ""


def rows(
    subject: Subject, loaded: Loaded, targets: list[float], peers: bool, tuned: bool, quick: bool
) -> Iterator[Row]:
    """Every line about one model."""
    began = time.perf_counter()
    yield Row("dense", None, loaded.evaluate(loaded.model, quick=quick), _minutes(began), subject.origin)
    for bits in targets:
        for peer in PEERS if peers else ():
            yield _peer(peer, subject, loaded, bits, quick)
        yield from _ours(subject, loaded, bits, tuned, quick)


def _peer(peer: Peer, subject: Subject, loaded: Loaded, bits: float, quick: bool) -> Row:
    if not peer.installed():
        return Row(f"{peer.name}, {bits}", None, {}, 0.0, "not installed")
    began = time.perf_counter()
    made: Converted = peer.run(loaded.matrices(), bits)
    minutes = _minutes(began)
    model = loaded.with_weights(made.weights)
    if subject.name.startswith("ResNet"):  # as ours
        model = reestimate_batch_norm(model, augmented(8))
    count = sum(matrix.numel() for matrix in loaded.matrices().values())
    return Row(
        f"{peer.name}, {bits}", made.stored_bits / count, loaded.evaluate(model, quick=quick), minutes, made.note
    )


def _ours(subject: Subject, loaded: Loaded, bits: float, tuned: bool, quick: bool) -> Iterator[Row]:
    recipe, names = RECIPES[subject.name], set(loaded.sites)
    others = rpqfx.Rule(lambda site: site.module_names[0] not in names, skip="not compared here")
    policy = rpqfx.Policy.pretrained(bits_per_weight=bits, min_size=0, rules=(others,))
    if subject.name.startswith("ResNet"):
        batches: list[Any] = [images for images, _ in augmented(recipe.batches)]
    else:
        batches = loaded.calibration(recipe.batches)
    began = time.perf_counter()
    small = rpqfx.convert(loaded.model, policy, batches)
    minutes = _minutes(began)
    report = rpqfx.report(small)
    yield Row(
        f"**rpqfx, {bits}**", report.bits_per_weight, loaded.evaluate(small, quick=quick), minutes, _shapes(report)
    )
    if not tuned:
        return
    began = time.perf_counter()
    done = rpqfx.finetune(small, teacher=loaded.model, data=recipe.data(loaded), steps=recipe.steps, **recipe.options)
    minutes += _minutes(began)
    note = f"{done.steps} steps, {done.recoded:,} of {done.codes:,} codes changed"
    bits_now = rpqfx.report(small).bits_per_weight
    yield Row(f"**rpqfx, {bits}, finetune**", bits_now, loaded.evaluate(small, quick=quick), minutes, note)


def _shapes(report: rpqfx.Report) -> str:
    found: dict[tuple[int, int], int] = {}
    for site in report.rewritten:
        if site.spec is not None:
            shape = (site.spec.codebook_dim, site.spec.codebook_bits)
            found[shape] = found.get(shape, 0) + 1
    return "; ".join(f"{n} x d={d}, {k} bits" for (d, k), n in sorted(found.items()))


def _minutes(began: float) -> float:
    return (time.perf_counter() - began) / 60


def _print(row: Row, keys: list[str], dense: dict[str, float]) -> None:
    scores = []
    for key in keys:
        value = row.scores.get(key)
        if value is None:
            scores.append("-")
        elif key.startswith("perplexity"):
            scores.append(f"{value:.2f} ({value / dense[key]:.3f} x)")
        else:
            scores.append(f"{value:.4f}")
    bits = "-" if row.bits is None else f"{row.bits:.3f}"
    print(f"| {row.who} | {bits} | {' | '.join(scores)} | {row.minutes:.1f} | {row.note} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="beginnings of names; all if left out")
    parser.add_argument("--bits", type=float, nargs="*", help="these targets only")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-finetune", action="store_true")
    parser.add_argument("--quick", action="store_true", help="leave out the long evaluations")
    parser.add_argument("--threads", type=int, default=2)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    print(f"torch {torch.__version__}, {wanted.threads} threads, {sys.platform}\n")
    for subject in SUBJECTS:
        if wanted.models and not any(subject.name.startswith(name) for name in wanted.models):
            continue
        loaded = subject.load()
        targets = [bits for bits in subject.targets if not wanted.bits or bits in wanted.bits]
        keys: list[str] = []
        dense: dict[str, float] = {}
        for row in rows(subject, loaded, targets, not wanted.no_peers, not wanted.no_finetune, wanted.quick):
            if not keys:
                keys, dense = list(row.scores), row.scores
                print(
                    f"| {subject.name} | bits | {' | '.join(keys)} | minutes | |\n|---|---|{'---|' * len(keys)}---|---|"
                )
            _print(row, keys, dense)
        print()


if __name__ == "__main__":
    main()
