"""Weights quantized while ``from_pretrained`` of transformers loads them, each as it comes, without data."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers.core_model_loading import ConversionOps
except ImportError as error:
    raise ImportError("this needs transformers 5, the extra: pip install 'rpqfx[transformers]'") from error

from rpqfx.conversion.dense_weight import StandIn
from rpqfx.conversion.fitting import fit_weight, train_codebooks
from rpqfx.conversion.observe import Observer
from rpqfx.errors import PolicyError, RewriteError
from rpqfx.graph.module_graphs import capture
from rpqfx.graph.pretrained_calls import renew_calls
from rpqfx.graph.records import record
from rpqfx.graph.replace import put
from rpqfx.graph.sites import find_sites
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.graph.validate import groups_of, layout_of, settle
from rpqfx.integrations.kept import Kept
from rpqfx.nn.weight import RPQWeight
from rpqfx.policies.decide import decide_all
from rpqfx.policies.decision import KeepDense, Quantize
from rpqfx.policies.policy import Policy, Rate
from rpqfx.reporting.report import dense_bytes
from rpqfx.storage.files import take_in

_SEVERAL = "shares codebooks with others, which are all needed at once to fit them; convert the model with rpqfx.rpqify"


class Quantizing(ConversionOps):
    """Quantizes one model while it is loaded.

    Args:
        model: On the meta device, dense; its weights are replaced as they come.
        policy: Says how each is held.
        seed: Of the fits.
        checkpoint: Folder for finished weights, so that a call that was interrupted goes on.

    Raises:
        PolicyError: If the policy rewrites nothing, or asks for what cannot be had while loading.
        FormatError: If the folder holds other work.
        OSError: If the folder cannot be written.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, seed: int, checkpoint: str | os.PathLike[str] | None = None
    ) -> None:  # fmt: skip
        self._seed, self._by_rate = seed, isinstance(policy.amount, Rate)
        _tie(model)
        captured = capture(model)
        self._sites = find_sites(captured)
        others = dense_bytes(model) - sum(site.dense_bytes for site in self._sites)
        decisions, self._notes = decide_all(policy, self._sites, others)
        self._settled = settle(decisions, self._sites)
        held = {name: decision for name, decision in self._settled.items() if isinstance(decision, Quantize)}
        self._groups: dict[str, object] = {}
        for key, names in groups_of(held).items():
            if len(names) > 1 and not self._by_rate:
                raise PolicyError(f"{names[0]} {_SEVERAL}")
            self._groups |= dict.fromkeys(names, key)
        for name, decision in held.items():
            if decision.init != "fit":
                raise PolicyError(
                    f"{name}: init={decision.init!r} draws codebooks anew, and from_pretrained has weights to fit them "
                    "to; use a policy that fits (Policy(...), Policy.pretrained(...))"
                )
        self._by_name = {site.name: site for site in self._sites}
        self._site_of = {own: name for name in held for own in self._by_name[name].names}
        self._ties: dict[str, str] = (
            getattr(model, "all_tied_weights_keys", None) or {}
        )  # those that are held are one already
        model.__dict__["all_tied_weights_keys"] = {t: s for t, s in self._ties.items() if t not in self._site_of}
        self._books: dict[object, nn.Parameter] = {}
        self._made: dict[str, str] = {}
        self._errors: dict[str, float | None] = {}
        self._failed: list[Exception] = []
        self._kept = None if checkpoint is None else Kept(checkpoint, _words(model, policy, seed))

    def __deepcopy__(self, memo: Any) -> Quantizing:
        """Each tensor has a converter of its own, and all of them this."""
        return self

    def conversions(self) -> list[Any]:
        """Returns that dense tensors come as transformers makes them."""
        return []

    def takes(self, name: str) -> bool:
        """Returns whether a tensor becomes codebooks.

        Args:
            name: Of the tensor.
        """
        return name in self._site_of

    def element_size(self, name: str) -> float | None:
        """Returns the bytes of an element of a weight that becomes codebooks; None of any other.

        Args:
            name: Of the tensor.
        """
        decision = self._settled.get(self._site_of.get(name, ""))
        return (
            decision.spec.stages * decision.spec.codebook_bits / decision.spec.codebook_dim / 8
            if isinstance(decision, Quantize)
            else None
        )

    def dtype_of(self, converter: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns the dtype that transformers gives a tensor.

        Args:
            converter: Says where it goes.
            dtype: What transformers would give it.
        """
        return dtype

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Quantizes a weight, in the model; an error is kept for ``finish``.

        Args:
            input_dict: The dense tensor.
            full_layer_name: Its name in the model.
            model: The model.
            missing_keys: What transformers has not found yet. Names of the weight are taken out.
            **kwargs: What others need.
        """
        (held,) = input_dict.values()
        dense = held[0] if isinstance(held, list) else held
        name = self._site_of[full_layer_name]
        if missing_keys is not None:
            missing_keys -= set(self._by_name[name].names)
        try:
            self._take(model, name, dense)
        except Exception as error:  # transformers would say that something went wrong, and not what
            self._failed.append(error)
        return {}

    def _take(self, model: nn.Module, name: str, dense: Tensor) -> None:
        digest = ""
        if len(self._by_name[name].names) > 1:  # the checkpoint may have a tied weight twice
            sum_of = hashlib.sha256()
            take_in(sum_of, dense)
            digest = sum_of.hexdigest()
        if name in self._made:
            if self._made[name] != digest:
                raise RewriteError(
                    f"{', '.join(self._by_name[name].names)} are tied by the config, and the checkpoint has two "
                    "different weights for them; set tie_word_embeddings=False in the config"
                )
            return
        self._made[name] = digest
        if not bool(torch.isfinite(dense).all()):
            raise RewriteError(f"{name} has infinite or NaN elements; mend it, or skip it with modules_to_not_convert")
        decision = self._settled[name]
        assert isinstance(decision, Quantize)
        weight = self._made_of(name, decision, nn.Parameter(dense))
        put(model, self._sites, {name: weight})
        for part in (weight, *(model.get_submodule(own.rpartition(".")[0]) for own in self._by_name[name].names)):
            part._is_hf_initialized = True  # type: ignore[assignment]

    def _made_of(self, name: str, decision: Quantize, dense: nn.Parameter) -> RPQWeight:
        """The weight as it was kept, or fitted now, and then kept."""
        found = (
            None
            if self._kept is None
            else self._kept.load(name, decision, layout_of(self._by_name[name], decision), dense)
        )
        if found is None:
            weight = self._fit(name, decision, dense)
            if self._kept is not None:
                self._kept.save(name, dense, weight, self._errors[name])
            return weight
        weight, self._errors[name] = found
        if self._by_rate:
            weight.codebooks = self._books.setdefault(self._groups[name], weight.codebooks)
            weight.shares_codebooks = self._shares(name)
        return weight

    def _shares(self, name: str) -> bool:
        return sum(other == self._groups[name] for other in self._groups.values()) > 1

    def _fit(self, name: str, decision: Quantize, dense: nn.Parameter) -> RPQWeight:
        layout = layout_of(self._by_name[name], decision)
        if not self._by_rate:
            weight = RPQWeight.from_dense(dense, decision.spec, layout, seed=self._seed, plan=decision.plan)
            norm = dense.float().norm()
            self._errors[name] = float((dense.float() - weight().float()).norm() / norm) if norm > 0 else 0.0
            return weight
        made = StandIn(decision.spec, layout, dense, Observer(()))
        made.plan = decision.plan
        key = self._groups[name]
        if key not in self._books:
            books = train_codebooks([(made.vectors, made.spec, None)], seed=self._seed)
            self._books[key] = nn.Parameter(books, made.trained)
        books = self._books[key]
        fit = fit_weight(made.vectors, made.spec, books.detach().to(made.vectors.device), None, None)
        self._errors[name] = fit.error
        made.shares_codebooks = self._shares(name)
        made.become(books, fit.codes, fit.factors, fit.signs)
        return made

    def finish(self, model: nn.Module) -> None:
        """Sees that every weight has come, and keeps what was done for the report.

        Args:
            model: The model.

        Raises:
            RPQError: What was raised while a weight was quantized.
        """
        if self._failed:
            raise self._failed[0]
        for name in self._groups:
            if name not in self._made:
                self._settled[name] = KeepDense("it is not in the checkpoint, and was drawn")
        model.__dict__["all_tied_weights_keys"] = self._ties
        adapt_pretrained(model)
        record(model, self._sites, self._settled, self._errors, notes=self._notes)
        renew_calls(model)


def _words(model: nn.Module, policy: Policy, seed: int) -> list[str]:
    """All that fits depend on but the weights."""
    shapes = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.named_parameters()]
    return [type(model).__name__, policy.to_json(), str(seed), *shapes]


def _tie(model: Any) -> None:
    """Ties what transformers will tie when all is loaded, so that it is quantized once."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in ties.items():
        if target in parameters and source in parameters and parameters[target].shape == parameters[source].shape:
            path, _, attribute = target.rpartition(".")
            model.get_submodule(path)._parameters[attribute] = parameters[source]
