"""Reports what routed blocks did with a batch: which tokens were heavy, and the multiply-adds that were saved."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError
from rpqfx.graph.calibration.batches import arguments
from rpqfx.graph.module_graphs import evaluating
from rpqfx.nn.wrappers import unwrapped
from rpqfx.policies.arguments import check_model
from rpqfx.reporting.tables import Table, to_html, to_markdown, to_text
from rpqfx.routing.rewrite.chooser import Chooser
from rpqfx.routing.rewrite.work import Work, works_of
from rpqfx.routing.router import Choice

_HEAD = ("block", "kind", "tokens", "heavy", "multiply-adds", "now", "saved")
_SHOWN = 8  # words of a sample that the text form names


@dataclass(frozen=True)
class RouteRecord:
    """One line of a report: a block and the tokens of a batch that are no padding.

    Args:
        name: Name of the block, as rules match it.
        kind: ``"feed_forward"`` or ``"attention"``.
        tokens: How many tokens there were.
        heavy: How many of them took the heavy branch.
        before: Multiply-adds of the block for the whole batch, padding too, were every token heavy.
        now: Those of both branches and the router.
    """

    name: str
    kind: str
    tokens: int
    heavy: int
    before: int
    now: int

    @property
    def saved(self) -> float:
        """Share of the multiply-adds that are saved; below 0 where the light branch costs more than that."""
        return 1 - self.now / self.before if self.before else 0.0


@dataclass(frozen=True)
class RouteReport:
    """Report of what routed blocks did with a batch; ``str``, ``to_markdown`` and ``to_html`` show the same data.

    Args:
        blocks: In the model's order.
        words: Of each sample, if they were given.
        often: Of each sample, and of each of its words the share of the blocks in which it was heavy.
    """

    blocks: tuple[RouteRecord, ...]
    words: tuple[tuple[str, ...], ...] = ()
    often: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    @property
    def saved(self) -> float:
        """Share of the multiply-adds of all routed blocks that are saved."""
        return 1 - sum(b.now for b in self.blocks) / max(1, sum(b.before for b in self.blocks))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        values = dataclasses.asdict(self)
        for block, record in zip(values["blocks"], self.blocks, strict=True):
            block["saved"] = record.saved
        return {**values, "saved": self.saved}

    def table(self) -> Table:
        """Returns the rows and totals that every form shows."""
        tokens, heavy = (sum(getattr(b, name) for b in self.blocks) for name in ("tokens", "heavy"))
        totals = [
            f"{heavy:,} of {tokens:,} tokens heavy ({heavy / max(1, tokens):.1%}) in {len(self.blocks)} routed blocks; "
            f"{self.saved:.1%} of their multiply-adds saved",
            *(_named(number, *sample) for number, sample in enumerate(zip(self.words, self.often, strict=True))),
        ]
        return Table(_HEAD, [_row(block) for block in self.blocks], totals)

    def __str__(self) -> str:
        return to_text(self.table())

    def to_markdown(self) -> str:
        """Returns a Markdown table with totals."""
        return to_markdown(self.table())

    def to_html(self) -> str:
        """Returns a self-contained HTML page: bars of multiply-adds, and words the darker the more often heavy."""
        samples = (
            "<p>" + " ".join(map(_marked, words, often)) + "</p>"
            for words, often in zip(self.words, self.often, strict=True)
        )
        return to_html(self.table(), [(b.before, b.now, True) for b in self.blocks], "".join(samples))


def report_routes(model: nn.Module, inputs: Any, *, words: Sequence[Sequence[str]] | None = None) -> RouteReport:
    """Returns how many tokens each routed block has heavy, what that saves, and which tokens they are.

    The model runs once, in eval mode; it is left as it is. Multiply-adds are those of weights, and of attention the
    products of queries with keys and of weights with values, causal or not.

    Args:
        model: A model that [`route`][rpqfx.route] returned; what stands around it is looked through.
        inputs: A batch: a tensor, a tuple of positional inputs or a mapping of keyword inputs.
        words: For each sample of the batch a word for each of its tokens, padding too, as a tokenizer has them.

    Returns:
        The report.

    Raises:
        InputError: If nothing in the model is routed or no routed block ran, the batch is none, or words are not as
            many as tokens.
    """
    check_model(model, "report_routes")
    model = unwrapped(model)
    works = works_of(model)
    if not works:
        raise InputError("nothing in this model is routed; pass the model that route returned")
    args, kwargs = arguments(inputs, "inputs")
    seen: dict[Chooser, list[tuple[Choice, Tensor]]] = {work.route.chooser: [] for work in works}

    def look(chooser: Any, given: tuple[Any, ...], choice: Choice) -> None:
        x, *mask = given
        kept = mask[0] if mask and mask[0] is not None else chooser.padding.of(x)
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if kept is None else kept
        seen[chooser].append((choice, kept))

    hooks = [work.route.chooser.register_forward_hook(look) for work in works]
    try:
        with evaluating(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    ran = [(work, seen[work.route.chooser]) for work in works if seen[work.route.chooser]]
    if not ran:
        raise InputError("no routed block ran on the inputs; give inputs that reach one")
    blocks = tuple(_record(work, calls) for work, calls in ran)
    if words is None:
        return RouteReport(blocks)
    given = tuple(tuple(str(word) for word in sample) for sample in words)
    return RouteReport(blocks, given, _often(given, [call for _, calls in ran for call in calls]))


def _record(work: Work, calls: Sequence[tuple[Choice, Tensor]]) -> RouteRecord:
    tokens = sum(int(kept.sum()) for _, kept in calls)
    heavy = sum(int((_heavy(choice, kept) & kept).sum()) for choice, kept in calls)
    shapes = [(kept.shape[0], kept.shape[1]) for _, kept in calls]
    slots = [n if c.indices is None else c.indices.shape[-1] for (c, _), (_, n) in zip(calls, shapes, strict=True)]
    before = sum(work.dense(*shape) for shape in shapes)
    now = sum(work.routed(*shape, places) for shape, places in zip(shapes, slots, strict=True))
    return RouteRecord(work.route.name, work.kind, tokens, heavy, before, now)


def _heavy(choice: Choice, kept: Tensor) -> Tensor:
    """``[B, n]`` bool: tokens that took the heavy branch."""
    if choice.indices is None:
        return torch.ones_like(kept)
    taken = torch.ones_like(choice.indices[:, 0]) if choice.mask is None else choice.mask[:, 0].long()
    return torch.zeros_like(kept, dtype=torch.long).scatter_add(1, choice.indices[:, 0], taken) > 0


def _often(words: Sequence[Sequence[str]], calls: Sequence[tuple[Choice, Tensor]]) -> tuple[tuple[float, ...], ...]:
    shape, shapes = (len(words), *{len(sample) for sample in words}), {tuple(kept.shape) for _, kept in calls}
    if shapes != {shape}:
        raise InputError(
            f"words are those of {len(words)} samples of {sorted({len(s) for s in words})} tokens, and routed blocks "
            f"saw samples and tokens {sorted(shapes)}; give a word for each token, padding too"
        )
    shares = torch.stack([(_heavy(choice, kept) & kept).double() for choice, kept in calls]).mean(0)
    return tuple(tuple(sample) for sample in shares.tolist())


def _row(block: RouteRecord) -> tuple[str, ...]:
    counts = (f"{block.tokens:,}", f"{block.heavy:,}", f"{block.before:,}", f"{block.now:,}")
    return (block.name, block.kind.replace("_", "-"), *counts, f"{block.saved:.1%}")


def _named(number: int, words: Sequence[str], often: Sequence[float]) -> str:
    """The words of a sample that are heavy most and least often, as text."""
    order = sorted(range(len(words)), key=lambda at: (-often[at], at))
    most, least = (
        ", ".join(f"{words[at]!r} {often[at]:.0%}" for at in some) for some in (order[:_SHOWN], order[-_SHOWN:])
    )
    return f"sample {number}, heavy most often: {most}; least often: {least}"


def _marked(word: str, share: float) -> str:
    style = f"background:rgba(43,108,176,{0.85 * share:.2f})"
    return f'<span style="{style}" title="{share:.0%}">{html.escape(word)}</span>'
