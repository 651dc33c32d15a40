"""A conversion: look at the model's inputs, decide, and fit weight after weight in the order of its run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.conversion.agreement import check_same_conversion
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.finished import Finished, in_range, prints_of, shapes_of
from rpqfx.conversion.fitting import fit_weight, train_codebooks
from rpqfx.conversion.gradients import Gradients
from rpqfx.conversion.importance import importance
from rpqfx.conversion.layerwise import Turns
from rpqfx.conversion.observe import Observer, Seen
from rpqfx.conversion.output_metrics import OutputMetrics
from rpqfx.conversion.ranks import Ranks
from rpqfx.conversion.row_weights import RowWeights
from rpqfx.conversion.shared_rows import shared_search
from rpqfx.conversion.unseen import unseen
from rpqfx.errors import RewriteError
from rpqfx.graph.calibration.batch_norm import estimate_norms, norms_of
from rpqfx.graph.calibration.batches import Batches
from rpqfx.graph.module_graphs import evaluating
from rpqfx.graph.records import record
from rpqfx.graph.replace import parameter_at, put
from rpqfx.graph.snapshot import Snapshot, small_tensors
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.graph.validate import groups_of, layout_of, settle
from rpqfx.nn.weight import RPQWeight
from rpqfx.policies.decision import KeepDense, Quantize
from rpqfx.policies.site import Site
from rpqfx.reporting.progress import Progress

Decide = Callable[[Mapping[str, float]], Mapping[str, Quantize | KeepDense]]


def convert_sites(
    model: nn.Module,
    sites: Sequence[Site],
    decide: Decide,
    calibration: Iterable[Any] = (),
    *,
    weigh: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    ranks: Ranks | None = None,
) -> nn.Module:
    """Fits a model's weights to codebooks, in place.

    First all batches run through the dense model, which shows the energy of each weight's inputs, and the decisions
    are made. Shared codebooks are trained on all weights that will use them. Then all batches run side by side and
    stop before each weight: it is fitted to the inputs that the weights before it, fitted already, let through.
    Weights without such inputs (tables, mostly) are fitted first. Last, batch norms are estimated again.

    Args:
        model: The model.
        sites: All its sites.
        decide: From the importance of each held site to decisions. Called first with nothing; once more, if ``weigh``
            is set and there is calibration.
        calibration: Batches (see ``Batches``).
        weigh: Whether to run batches backwards as well: gradients show what errors cost, of each weight, and of each
            row of its inputs and each of its outputs.
        seed: Of codebooks.
        progress: Called with (done, total, site name).
        checkpoint: Folder in which finished weights are kept.
        ranks: The processes that share the work, each with all of the model and all batches. All get the same result,
            which is that of one process.

    Returns:
        ``model``.

    Raises:
        InputError: If the model rejects a batch. Whatever is raised, the model is then as it was.
        RewriteError: If a weight is not finite, or a decision cannot be followed.
        FormatError: If the folder holds another conversion.
        OSError: If the folder cannot be written; what was saved before stays.
        DistributedError: If processes call for different conversions, or another one has failed.
    """
    before = Snapshot(model, values=small_tensors(model))
    try:
        _Conversion(model, sites, decide, Batches(model, calibration), weigh, seed, progress, checkpoint, ranks).run()
        return model
    except BaseException:
        before.restore()
        raise


class _Conversion:
    def __init__(
        self, model: nn.Module, sites: Sequence[Site], decide: Decide, batches: Batches, weigh: bool,
        seed: int, progress: Progress | None, folder: str | os.PathLike[str] | None, ranks: Ranks | None,
    ) -> None:  # fmt: skip
        self._model, self._sites, self._decide, self._batches = model, sites, decide, batches
        self._weigh, self._seed, self._progress, self._folder = weigh, seed, progress, folder
        self._errors: dict[str, float | None] = {}
        self._calibrated: set[str] = set()
        self._by_name = {site.name: site for site in sites}
        self._gradients: Gradients | None = None
        self._outputs: OutputMetrics | None = None
        self._ranks = Ranks() if ranks is None else ranks
        self._search = shared_search(self._ranks)

    def run(self) -> None:
        settled = settle(self._decide({}), self._sites)
        self._weights = self._stand_ins({n: d for n, d in settled.items() if isinstance(d, Quantize)})
        put(self._model, self._sites, self._weights)
        check_same_conversion(self._ranks, self._model, self._dense(), self._batches.calls, {
            "the policy": repr(sorted((name, repr(decision)) for name, decision in settled.items())),
            "seed": str(self._seed), "checkpoint": str(self._folder and os.fspath(self._folder)),
        })  # fmt: skip
        with evaluating(self._model):
            seen = self._observe(self._weights.values())
            notes = unseen(self._weights, seen) if self._batches.runs else []
            if self._batches.runs and self._weigh:
                assert self._gradients is not None
                costs = importance(list(self._weights.values()), self._gradients, len(self._batches.runs))
                named = {name: costs[weight] for name, weight in self._weights.items()}
                settled = settle(self._decide(self._ranks.from_rank(0, "importance", named)), self._sites)
            self._settle_specs(settled)
            decided = repr(sorted((name, repr(decision)) for name, decision in self._decisions.items()))
            words = [decided, str(self._seed)]
            kept = "" if self._folder is None else prints_of(self._model, self._dense(), self._batches.calls, words)
            self._store = Finished(self._folder, kept, self._ranks)
            self._outputs = None if self._gradients is None else OutputMetrics(self._gradients, self._ranks)
            self._codebooks = self._train(seen)
            for name, weight in self._weights.items():
                if not seen[weight].once:
                    self._fit(name, self._metric(weight, seen))
            self._fit_in_turn(seen)
            self._estimate_norms()
        adapt_pretrained(self._model)  # not before: only now is it known which weights share codebooks
        record(self._model, self._sites, settled, self._errors, calibrated=self._calibrated, notes=notes)

    def _stand_ins(self, decisions: Mapping[str, Quantize]) -> dict[str, StandIn]:
        made: dict[str, StandIn] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, decision in decisions.items():
            parameter = parameter_at(self._model, name)
            if parameter.is_meta:
                raise RewriteError(f"{name} is on the meta device and has no values to convert; load the weights first")
            if not bool(torch.isfinite(parameter).all()):
                raise RewriteError(f"{name} has infinite or NaN elements; mend it, or skip it with a Rule")
            self._parameters[name] = parameter
            made[name] = StandIn(decision.spec, layout_of(self._by_name[name], decision), parameter, Observer(()))
            made[name].plan, made[name].noted = decision.plan, dict(parameter.__dict__)
        return made

    def _observe(self, weights: Iterable[StandIn]) -> dict[RPQWeight, Seen]:
        """Energies of inputs; of weights that one batch uses several times, second moments as well."""
        weights = list(weights)
        self._gradients = Gradients(self._model, weights, ranks=self._ranks) if self._weigh else None
        observer = Observer(weights, ranks=self._ranks) if self._gradients is None else self._gradients
        self._watch(observer, "reading inputs")
        often = [w for w in weights if observer.seen[w].uses > 1 and not observer.seen[w].looked_up]
        if often:
            closer = Observer(often, energy_only=False, rows=self._rows(), ranks=self._ranks)
            self._watch(closer, "reading inputs that are used several times")
            for weight in often:
                observer.seen[weight].moments = closer.seen[weight].moments
        return observer.seen

    def _rows(self) -> RowWeights | None:
        return None if self._gradients is None else self._gradients.rows

    def _metric(self, weight: StandIn, seen: Mapping[RPQWeight, Seen]) -> Tensor | None:
        """Returns what is known of the inputs of a weight that runs do not stop for; of a table, of what it gives."""
        table = None if self._gradients is None else self._gradients.tables.get(weight)
        return seen[weight].moments.mean if table is None else table.mean

    def _watch(self, observer: Observer, what: str) -> None:
        runs = self._batches.runs

        def after(number: int) -> None:
            if self._progress is not None:
                self._progress(number + 1, len(runs), f"{what}, batch {number + 1}")

        observer.watch(runs, after)

    def _settle_specs(self, settled: Mapping[str, Quantize | KeepDense]) -> None:
        self._decisions: dict[str, Quantize] = {}
        for name, weight in self._weights.items():
            decision = settled.get(name)
            if not isinstance(decision, Quantize) or layout_of(self._by_name[name], decision) != weight.layout:
                raise RewriteError(f"{name}: calibration changed how its vectors lie; decide that beforehand")
            weight.spec, weight.plan = decision.spec, decision.plan
            self._decisions[name] = decision

    def _dense(self) -> list[Tensor]:
        return [weight.vectors for weight in self._weights.values()]

    def _train(self, seen: Mapping[RPQWeight, Seen]) -> dict[str, nn.Parameter]:
        """The codebooks of each weight, one Parameter for all that share them."""
        trained: dict[str, nn.Parameter] = {}
        groups, rank, size = list(groups_of(self._decisions).values()), self._ranks.rank, self._ranks.size
        for first in range(0, len(groups), size):  # one group for each process
            some = groups[first : first + size]
            found = [self._store.load(f"codebooks of {group[0]}", self._books_shape(group[0])) for group in some]
            made = None
            if rank < len(some) and found[rank] is None:
                weights = [self._weights[name] for name in some[rank]]
                members = [(w.vectors, w.spec, _energy(self._metric(w, seen))) for w in weights]
                made = {"codebooks": train_codebooks(members, seed=self._seed)}
            others = self._ranks.gather("codebooks", made)
            for group, kept, new in zip(some, found, others, strict=False):  # of the last some, one process has none
                if kept is None:
                    kept = new
                    self._store.save(f"codebooks of {group[0]}", kept)
                self._share(group, kept["codebooks"], trained)
        return trained

    def _books_shape(self, name: str) -> dict[str, tuple[int, ...]]:
        return {"codebooks": self._weights[name].spec.codebooks_shape}

    def _share(self, group: Sequence[str], codebooks: Tensor, trained: dict[str, nn.Parameter]) -> None:
        """Makes codebooks the Parameter of all weights of a group."""
        first = self._weights[group[0]]
        books = nn.Parameter(codebooks.to(first.vectors.device), first.trained)
        books.__dict__.update(self._parameters[group[0]].__dict__)
        for name in group:
            trained[name], self._weights[name].shares_codebooks = books, len(group) > 1

    def _fit_in_turn(self, seen: Mapping[RPQWeight, Seen]) -> None:
        names: dict[RPQWeight, str] = {w: name for name, w in self._weights.items() if seen[w].once}
        order = {weight: seen[weight].rank for weight in names}

        def fit(weight: RPQWeight, moment: Callable[[], Tensor]) -> None:
            self._fit(names[weight], moment)

        Turns(self._batches, names, order, fit, self._rows(), self._ranks).run()
        for weight, name in names.items():
            if isinstance(weight, StandIn):  # batches no longer come here
                self._fit(name, seen[weight].moments.mean)

    def _fit(self, name: str, moment: Tensor | Callable[[], Tensor] | None) -> None:
        weight = self._weights[name]
        assert isinstance(weight, StandIn)
        kept = self._store.load(name, shapes_of(weight.spec))
        if kept is None or not in_range(kept["codes"], weight.spec):
            made = self._fitted(weight, self._codebooks[name].detach(), moment() if callable(moment) else moment)
            kept = self._ranks.from_rank(0, "a fitted weight", made)
            self._store.save(name, kept)
        if self._outputs is not None:
            self._outputs.forget(weight)
        if self._gradients is not None:
            self._gradients.rows.forget(weight)
        self._errors[name] = float(kept.pop("error"))
        if moment is not None:
            self._calibrated.add(name)
        device = weight.vectors.device
        held = {key: tensor.to(device) for key, tensor in kept.items()}
        codes, signs = held.pop("codes"), held.pop("signs", None)
        weight.become(self._codebooks[name], codes, held, signs)
        if self._progress is not None:
            self._progress(len(self._errors), len(self._weights), name)

    def _fitted(self, weight: StandIn, codebooks: Tensor, known: Tensor | None) -> dict[str, Tensor]:
        """Fits a weight to its inputs' second moment ``[D, D]``, or to its diagonal alone, or to itself."""
        full = known if known is not None and known.dim() == 2 else None
        outputs = None if self._outputs is None or full is None else self._outputs.take(weight)
        fit = fit_weight(
            weight.vectors, weight.spec, codebooks, full, known if full is None else None, outputs, self._search
        )
        found = {"codes": fit.codes.to(weight.spec.code_dtype), **fit.factors, "error": torch.tensor(fit.error)}
        return found if fit.signs is None else {**found, "signs": fit.signs}

    def _estimate_norms(self) -> None:
        """Estimates statistics of batch norms in one process, for all."""
        if not self._ranks.rank:
            estimate_norms(self._model, self._batches.runs)
        if self._ranks.size > 1:
            buffers = [buffer for norm in norms_of(self._model) for buffer in norm.buffers()]
            for buffer, value in zip(buffers, self._ranks.from_rank(0, "batch norms", buffers), strict=True):
                buffer.copy_(value)


def _energy(mean: Tensor | None) -> Tensor | None:
    return mean.diagonal() if mean is not None and mean.dim() == 2 else mean
