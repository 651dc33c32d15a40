"""rpqify: capture, decide, rewrite, in one call."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rpqfx.conversion import convert
from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.graph.calibration.batches import calibration_of
from rpqfx.graph.copying import copy_model
from rpqfx.graph.module_graphs import capture, evaluating, take_shapes
from rpqfx.graph.presence import check_loaded
from rpqfx.graph.pretrained_calls import renew_calls
from rpqfx.graph.replace import parameter_at, rewrite
from rpqfx.graph.single_graph import whole_graph
from rpqfx.graph.sites import find_sites, is_rewritten
from rpqfx.graph.snapshot import Snapshot, small_tensors
from rpqfx.nn.hosting.backed import backed_weights
from rpqfx.nn.wrappers import refuse_distributed, rewrapped, unwrapped
from rpqfx.policies.arguments import (
    check_call,
    check_model,
    check_path,
    check_policy,
    check_progress,
    keyword,
    positional,
)
from rpqfx.policies.decide import decide_all
from rpqfx.policies.decision import Skip
from rpqfx.policies.policy import Decide, Hold, Policy, Rate
from rpqfx.reporting.progress import Progress
from rpqfx.reporting.progress import shown as shown_progress
from rpqfx.reporting.records import attach_records, attached_records
from rpqfx.reporting.report import dense_bytes
from rpqfx.validation.values import check_seed, flag


def rpqify(
    model: nn.Module,
    policy: Policy | Decide | None = None,
    *,
    example_inputs: Tensor | Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    inplace: bool = False,
    as_graph: bool = False,
    seed: int | None = None,
    progress: Progress | bool | None = None,
    calibration: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Rewrites a model so that its weights live in codebooks.

    Every Linear, Embedding, convolution, Bilinear, MultiheadAttention and recurrent layer, and every Parameter that a
    module uses in a product, a convolution or a lookup of its own, is held as a policy says. Classes, names, hooks,
    flags, methods and ties stay. What is not rewritten stays exactly as it was;
    [`report`][rpqfx.reporting.report.report] says why.

    Args:
        model: Any module, on any device. Of a wrapped one (``torch.compile``, ``DataParallel``, ``AveragedModel``) the
            model within is rewritten, by the names that it has there, and wrapped again. On the meta device
            nothing is allocated; [`materialize`][rpqfx.storage.materialize.materialize] does that later.
        policy: A [`Policy`][rpqfx.policies.policy.Policy], or a callable from a site to a spec or a skip. It has to be
            given.
        example_inputs: Positional inputs of one call, or the one tensor that the model takes. With them the rewritten
            model is run beside the dense one that holds the expanded weights, and lazy modules take their shapes.
        example_kwargs: Keyword inputs of that call.
        inplace: Rewrite ``model`` itself. Otherwise it is left untouched, and the result shares no tensor with it.
        as_graph: Return one whole ``torch.fx.GraphModule``, codebook layers as leaf nodes.
        seed: Of fits, 0 if left out, and of codebooks that are drawn, which are drawn from torch's global generator if
            it is left out.
        progress: Called with (done, total, site name) after each site. True shows a line with the time left on
            standard error, False nothing; left out, the line is shown during a calibrated conversion on a terminal.
        calibration: Batches of the model's inputs, each a tensor, a tuple of positional inputs or a mapping of keyword
            inputs. Codebooks are then fitted to what the model does with its weights
            ([`convert`][rpqfx.conversion.convert]), and batch-norm statistics estimated again. The report says which
            weights no batch reached.
        checkpoint: Folder for finished weights of a conversion (a policy with ``bits_per_weight``, or calibration).
            The same call with the same folder goes on where it was interrupted, to the same result.

    Where this raises anything, an interrupt (Ctrl-C) among it, ``model`` is as it was, also with ``inplace`` (but for
    shapes that lazy modules have taken), and so are torch's global generators.

    Returns:
        The rewritten model, of the same class (a GraphModule with ``as_graph``), in the same mode.

    Raises:
        InputError: If ``model`` is not a module, or rejects a calibration batch; if calibration holds no batch, or one
            that is empty or not finite, or reaches no weight; if an argument would do nothing.
        RewriteError: If the model already holds weights in codebooks, cannot be copied, is in
            ``DistributedDataParallel`` or FSDP (rewrite it before), has been loaded in part (some weights are on the
            meta device, or offloaded by accelerate), or (with example inputs) does not compute what the dense model
            with the expanded weights does.
        PolicyError: If there is no policy, or it rewrites nothing or cannot be followed: codebooks that are drawn anew
            (``init="random"``) are not calibrated.
        FormatError: If the checkpoint folder holds another conversion.
        OSError: If the checkpoint folder cannot be written; what was saved before stays.
        CaptureError: If a lazy module has never run, or ``as_graph`` cannot capture the model.
    """
    check_model(model, "rpqify")
    check_policy(policy, Policy, any_callable=True)
    assert policy is not None
    flag("inplace", inplace, error=InputError)
    flag("as_graph", as_graph, error=InputError)
    refuse_distributed(model, "rpqify")
    if (inner := unwrapped(model)) is not model:
        small = rpqify(
            inner, policy, example_inputs=example_inputs, example_kwargs=example_kwargs, inplace=inplace,
            as_graph=as_graph, seed=seed, progress=progress, calibration=calibration, checkpoint=checkpoint,
        )  # fmt: skip
        return small if as_graph else rewrapped(model, small)
    if seed is not None:
        check_seed(seed)
    check_progress(progress)
    runs = example_inputs is not None or example_kwargs is not None
    args = positional(example_inputs, "example_inputs") if runs else None
    kwargs = keyword(example_kwargs, "example_kwargs") if runs else None
    if args is not None and kwargs is not None:
        check_call(model, args, kwargs)
    converts = calibration is not None or (isinstance(policy, Policy) and isinstance(policy.amount, Rate))
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
        if not converts:
            raise InputError(
                "a checkpoint is for a conversion; give calibration batches, or a policy with bits_per_weight"
            )
    if is_rewritten(model):
        raise RewriteError(
            "this model already holds weights in codebooks; start from the dense model, with one policy whose rules "
            "say what differs from layer to layer"
        )
    if inplace:
        take_shapes(model, args, kwargs)
    before = Snapshot(model, values=small_tensors(model) if inplace and converts else ())
    try:
        batches = [] if calibration is None else calibration_of(calibration)
        with torch.inference_mode(False):  # what is made in it could not be trained
            return _rewritten(model, policy, args, kwargs, inplace, as_graph, seed, progress, batches, checkpoint)
    except BaseException:
        before.restore()
        raise


def _rewritten(
    model: nn.Module, policy: Policy | Decide, args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None,
    inplace: bool, as_graph: bool, seed: int | None, progress: Progress | bool | None, batches: list[Any],
    checkpoint: str | os.PathLike[str] | None,
) -> nn.Module:  # fmt: skip
    """See ``rpqify``; where this raises, ``model`` may be anything."""
    runs = args is not None
    if runs and not inplace:  # lazy modules take their shapes in place
        model, inplace = copy_model(model), True
    captured = capture(model, args, kwargs)
    sites = find_sites(captured)
    others = dense_bytes(model) - sum(site.dense_bytes for site in sites)
    decisions, notes = decide_all(policy, sites, others)
    weigh = isinstance(policy, Policy) and isinstance(policy.amount, Rate)
    if batches or weigh:
        _check_fitted(decisions, "calibration" if batches else "bits_per_weight")
    check_loaded(captured.model, sites, decisions)
    if not inplace:
        replaced = [parameter_at(model, site.name) for site in sites if isinstance(decisions[site.name], Hold)]
        captured = dataclasses.replace(captured, model=copy_model(model, replaced))
    expected = _Expected(captured.model, args, kwargs) if runs else None
    if batches or weigh:

        def decide(importance: Mapping[str, float]) -> dict[str, Hold | Skip]:
            return decide_all(policy, sites, others, importance)[0] if importance else decisions

        small = convert(
            captured.model, sites, decide, batches, weigh=weigh, seed=seed or 0,
            progress=shown_progress(progress, quiet=not batches), checkpoint=checkpoint,
        )  # fmt: skip
    else:
        small = rewrite(captured, decisions, sites, seed=seed, progress=shown_progress(progress, quiet=True))
    records, more = attached_records(small) or ((), ())
    attach_records(small, records, (*notes, *more))
    renew_calls(small)
    if expected is not None:
        expected.check(small)
    return whole_graph(small, args, kwargs) if as_graph else small


def _check_fitted(decisions: Mapping[str, Hold | Skip], by: str) -> None:
    """Sees that a conversion has nothing to draw anew."""
    for name, decision in decisions.items():
        if isinstance(decision, Hold) and decision.init != "fit":
            raise PolicyError(
                f"{name}: init={decision.init!r} draws codebooks anew, and {by} fits them to the weight that is there; "
                "use a policy that fits (Policy(...), Policy.pretrained(...)), or leave out the calibration"
            )


class _Expected:
    """What the dense model that holds the expanded weights returns, to be held against the rewritten one."""

    def __init__(self, model: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> None:
        self._dense = copy_model(model)
        self._args, self._kwargs = tuple(args or ()), dict(kwargs or {})

    @torch.no_grad()
    def check(self, small: nn.Module) -> None:
        """Raises RewriteError where the two differ."""
        for path, module in small.named_modules():
            for name, weight in backed_weights(module).items():
                parameter_at(self._dense, f"{path}.{name}".lstrip(".")).copy_(weight())
        trial = copy_model(small)  # a run may leave traces behind, in buffers and caches
        with evaluating(trial), evaluating(self._dense):
            found, shape = tree_flatten(trial(*self._args, **self._kwargs))
            wanted, wanted_shape = tree_flatten(self._dense(*self._args, **self._kwargs))
        same = shape == wanted_shape
        for a, b in zip(found, wanted, strict=False):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point():
                tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
                same &= bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max()))))
        if not same:
            raise RewriteError(
                "on the example inputs the rewritten model does not compute what the dense model with the expanded "
                "weights does; please report the model, and skip the layers that cause it with a Rule"
            )
