"""A conversion: look at the model's inputs, decide, and fit weight after weight in the order of its run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rpqfx.conversion.checkpoint import Checkpoint, fingerprint
from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.finished import in_range, shapes_of
from rpqfx.conversion.fitting import fit_weight, train_codebooks
from rpqfx.conversion.gradients import Gradients
from rpqfx.conversion.importance import importance
from rpqfx.conversion.layerwise import Turns
from rpqfx.conversion.observe import Observer, Seen
from rpqfx.conversion.row_weights import RowWeights
from rpqfx.errors import InputError, RewriteError
from rpqfx.graph.calibration.batch_norm import estimate_norms
from rpqfx.graph.calibration.batches import Batches
from rpqfx.graph.module_graphs import evaluating
from rpqfx.graph.records import record
from rpqfx.graph.replace import parameter_at, put
from rpqfx.graph.snapshot import Snapshot, small_tensors
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.graph.validate import groups_of, layout_of, settle
from rpqfx.nn.weight import RPQWeight
from rpqfx.policies.decision import Hold, Skip
from rpqfx.policies.site import Site
from rpqfx.reporting.progress import Progress

Decide = Callable[[Mapping[str, float]], Mapping[str, Hold | Skip]]

_NAMED = 4
_METHOD = "rows and columns"  # of fitting: a folder that was begun with another holds another conversion


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

    Returns:
        ``model``.

    Raises:
        InputError: If the model rejects a batch. Whatever is raised, the model is then as it was.
        RewriteError: If a weight is not finite, or a decision cannot be followed.
        FormatError: If the folder holds another conversion.
        OSError: If the folder cannot be written; what was saved before stays.
    """
    before = Snapshot(model, values=small_tensors(model))
    try:
        _Conversion(model, sites, decide, Batches(model, calibration), weigh, seed, progress, checkpoint).run()
        return model
    except BaseException:
        before.restore()
        raise


class _Conversion:
    def __init__(
        self, model: nn.Module, sites: Sequence[Site], decide: Decide, batches: Batches, weigh: bool,
        seed: int, progress: Progress | None, folder: str | os.PathLike[str] | None,
    ) -> None:  # fmt: skip
        self._model, self._sites, self._decide, self._batches = model, sites, decide, batches
        self._weigh, self._seed, self._progress, self._folder = weigh, seed, progress, folder
        self._errors: dict[str, float | None] = {}
        self._calibrated: set[str] = set()
        self._by_name = {site.name: site for site in sites}
        self._gradients: Gradients | None = None

    def run(self) -> None:
        settled = settle(self._decide({}), self._sites)
        self._weights = self._stand_ins({n: d for n, d in settled.items() if isinstance(d, Hold)})
        put(self._model, self._sites, self._weights)
        with evaluating(self._model):
            seen = self._observe(self._weights.values())
            notes = self._check_seen(seen)
            if self._batches.runs and self._weigh:
                assert self._gradients is not None
                costs = importance(list(self._weights.values()), self._gradients, len(self._batches.runs))
                settled = settle(self._decide({name: costs[w] for name, w in self._weights.items()}), self._sites)
            self._settle_specs(settled)
            self._store = self._open_store()
            self._codebooks = self._train(seen)
            for name, weight in self._weights.items():
                if not seen[weight].once:
                    self._fit(name, self._metric(weight, seen))
            self._fit_in_turn(seen)
            estimate_norms(self._model, self._batches.runs)
        adapt_pretrained(self._model)  # not before: only now is it known which weights share codebooks
        record(self._model, self._sites, settled, self._errors, calibrated=self._calibrated, notes=notes)

    def _stand_ins(self, holds: Mapping[str, Hold]) -> dict[str, StandIn]:
        made: dict[str, StandIn] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, hold in holds.items():
            parameter = parameter_at(self._model, name)
            if parameter.is_meta:
                raise RewriteError(f"{name} is on the meta device and has no values to convert; load the weights first")
            if not bool(torch.isfinite(parameter).all()):
                raise RewriteError(f"{name} has infinite or NaN elements; mend it, or skip it with a Rule")
            self._parameters[name] = parameter
            made[name] = StandIn(hold.spec, layout_of(self._by_name[name], hold), parameter, Observer(()))
            made[name].plan, made[name].noted = hold.plan, dict(parameter.__dict__)
        return made

    def _observe(self, weights: Iterable[StandIn]) -> dict[RPQWeight, Seen]:
        """Energies of inputs; of weights that one batch uses several times, second moments as well."""
        weights = list(weights)
        self._gradients = Gradients(self._model, weights) if self._weigh else None
        observer = Observer(weights) if self._gradients is None else self._gradients
        self._watch(observer, "reading inputs")
        often = [w for w in weights if observer.seen[w].uses > 1 and not observer.seen[w].looked_up]
        if often:
            closer = Observer(often, energy_only=False, rows=self._rows())
            self._watch(closer, "reading inputs that are met several times")
            for weight in often:
                observer.seen[weight].moments = closer.seen[weight].moments
        return observer.seen

    def _rows(self) -> RowWeights | None:
        return None if self._gradients is None else self._gradients.rows

    def _metric(self, weight: StandIn, seen: Mapping[RPQWeight, Seen]) -> Tensor | None:
        """Returns what is known of the inputs of a weight that runs do not stop for; of a table, of what it gives."""
        table = None if self._gradients is None else self._gradients.tables.get(weight)
        return seen[weight].moments.mean if table is None else table.mean

    def _check_seen(self, seen: Mapping[RPQWeight, Seen]) -> list[str]:
        """Remarks for the report on what calibration did not show.

        Raises:
            InputError: If inputs of a weight are not finite, or no batch reaches any.
        """
        if not self._batches.runs:
            return []
        for name, weight in self._weights.items():
            mean = seen[weight].moments.mean
            if mean is not None and not bool(torch.isfinite(mean).all()):
                raise InputError(
                    f"{name}: its inputs' second moment has infinite or NaN elements; look at the calibration batches, "
                    "or skip the weight with a Rule"
                )
        missed = [name for name, weight in self._weights.items() if not seen[weight].reached]
        if not any(one.reached or one.read for one in seen.values()):
            raise InputError(
                "no calibration batch reaches any weight that is to be in codebooks, so nothing can be seen of their "
                f"inputs ({', '.join(missed[:3])}); give batches as the model is called with in use"
            )
        unknown = [name for name in missed if seen[self._weights[name]].read]
        missed = [name for name in missed if name not in unknown]
        why = {"calibration did not reach": missed, "no product shows the inputs of": unknown}
        return [f"{text} {_named(names)}: fitted to the weights alone" for text, names in why.items() if names]

    def _watch(self, observer: Observer, what: str) -> None:
        runs = self._batches.runs

        def after(number: int) -> None:
            if self._progress is not None:
                self._progress(number + 1, len(runs), f"{what}, batch {number + 1}")

        observer.watch(runs, after)

    def _settle_specs(self, settled: Mapping[str, Hold | Skip]) -> None:
        self._holds: dict[str, Hold] = {}
        for name, weight in self._weights.items():
            hold = settled.get(name)
            if not isinstance(hold, Hold) or layout_of(self._by_name[name], hold) != weight.layout:
                raise RewriteError(f"{name}: calibration changed how its vectors lie; decide that beforehand")
            weight.spec, weight.plan = hold.spec, hold.plan
            self._holds[name] = hold

    def _open_store(self) -> Checkpoint | None:
        if self._folder is None:
            return None
        inputs, shape = tree_flatten(self._batches.calls)
        plain = [repr(leaf) for leaf in inputs if isinstance(leaf, (bool, int, float, str))]
        decided = repr(sorted((name, repr(hold)) for name, hold in self._holds.items()))
        words = [decided, str(self._seed), str(shape), _METHOD]
        held = [
            *(w.vectors for w in self._weights.values()),
            *self._model.parameters(),
            *self._model.buffers(),
            *inputs,
        ]
        tensors = [tensor for tensor in held if isinstance(tensor, Tensor) and not tensor.is_meta]
        return Checkpoint(self._folder, fingerprint([*words, *plain], tensors))

    def _train(self, seen: Mapping[RPQWeight, Seen]) -> dict[str, nn.Parameter]:
        """The codebooks of each weight, one Parameter for all that share them."""
        trained: dict[str, nn.Parameter] = {}
        for group in groups_of(self._holds).values():
            weights = [self._weights[name] for name in group]
            shapes = {"codebooks": weights[0].spec.codebooks_shape}
            kept = None if self._store is None else self._store.load(f"codebooks of {group[0]}", shapes)
            if kept is None:
                members = [(w.vectors, w.spec, _energy(self._metric(w, seen))) for w in weights]
                kept = {"codebooks": train_codebooks(members, seed=self._seed)}
                if self._store is not None:
                    self._store.save(f"codebooks of {group[0]}", kept)
            books = nn.Parameter(kept["codebooks"].to(weights[0].vectors.device), weights[0].trained)
            books.__dict__.update(self._parameters[group[0]].__dict__)
            for name, weight in zip(group, weights, strict=True):
                trained[name], weight.shares_codebooks = books, len(group) > 1
        return trained

    def _fit_in_turn(self, seen: Mapping[RPQWeight, Seen]) -> None:
        names: dict[RPQWeight, str] = {w: name for name, w in self._weights.items() if seen[w].once}
        ranks = {weight: seen[weight].rank for weight in names}
        turns = Turns(
            self._batches, names, ranks, lambda weight, moment: self._fit(names[weight], moment), self._rows()
        )
        turns.run()
        for weight, name in names.items():
            if isinstance(weight, StandIn):  # batches no longer come here
                self._fit(name, seen[weight].moments.mean)

    def _fit(self, name: str, moment: Tensor | Callable[[], Tensor] | None) -> None:
        weight = self._weights[name]
        assert isinstance(weight, StandIn)
        outputs = None if self._gradients is None else self._gradients.outputs.pop(weight, None)
        kept = None if self._store is None else self._store.load(name, shapes_of(weight.spec))
        if kept is None or not in_range(kept["codes"], weight.spec):
            known = moment() if callable(moment) else moment
            full = known if known is not None and known.dim() == 2 else None
            energy = known if full is None else None
            fit = fit_weight(
                weight.vectors, weight.spec, self._codebooks[name].detach(), full, energy,
                None if outputs is None or full is None else outputs.trusted(_sizes(weight.vectors)),
            )  # fmt: skip
            kept = {"codes": fit.codes.to(weight.spec.code_dtype), **fit.factors, "error": torch.tensor(fit.error)}
            if fit.signs is not None:
                kept["signs"] = fit.signs
            if self._store is not None:
                self._store.save(name, kept)
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


def _sizes(vectors: Tensor) -> Tensor:
    """Returns the root mean squares of rows, which their errors are in proportion to."""
    return (vectors if vectors.dtype == torch.float64 else vectors.float()).square().mean(1).sqrt()


def _energy(mean: Tensor | None) -> Tensor | None:
    return mean.diagonal() if mean is not None and mean.dim() == 2 else mean


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
