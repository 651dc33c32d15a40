"""Rewrites a model so that its attention reads its older keys and values from codes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.graph.calibration.batches import Batches, calibration_of
from rpqfx.graph.calibration.probe import probe
from rpqfx.graph.copying import copy_model
from rpqfx.graph.module_graphs import evaluating
from rpqfx.graph.nested_tensors import without_nested_tensors
from rpqfx.graph.seeds import drawn_from
from rpqfx.graph.snapshot import Snapshot, small_tensors
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.kv.calibration_files import CalibrationPath, SavedCalibration, opened
from rpqfx.kv.chosen_sites import chosen_sites
from rpqfx.kv.coder.calibrate import find_space, fit_coders, share_codebooks
from rpqfx.kv.coder.head_coder import HeadCoder
from rpqfx.kv.coder.statistics import Moments, Watch
from rpqfx.kv.dense_check import tried
from rpqfx.kv.generation import adapt_generation
from rpqfx.kv.module import KVAttention, attentions
from rpqfx.kv.policy import KVPolicy
from rpqfx.kv.wrap import unwrap, wrap
from rpqfx.nn.wrappers import refuse_distributed
from rpqfx.policies.arguments import check_model, check_policy, check_progress
from rpqfx.reporting.progress import Progress, shown
from rpqfx.validation.values import check_seed, flag

# Every so many vectors one is kept to fit codebooks to: a set that serves the whole model needs few of each layer.
_STEP, _STEP_OWN = 8, 2


def quantize_kv(
    model: nn.Module,
    policy: KVPolicy | CalibrationPath | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    fit: bool = True,
    inplace: bool = False,
    seed: int | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Returns a copy of a model, or with ``inplace`` the model itself, that keeps older keys and values as codes.

    Attention modules are found as ``rpqify`` finds weights: those whose forward calls
    ``scaled_dot_product_attention``, ``torch.nn.MultiheadAttention``, those of transformers, and, by a run of the first
    batch, those that multiply queries by keys and weights by values themselves, causally. Each gets a
    [`KVAttention`][rpqfx.kv.module.KVAttention], fitted to what the batches show. The result is called as the model
    was, and gives what it would give with a [`CodebookCache`][rpqfx.kv.model_cache.CodebookCache] filled token by
    token.

    Args:
        model: Any model.
        policy: How keys and values are held; ``KVPolicy()`` if left out. Or the path of a calibration that
            ``rpqfx.save_calibration`` wrote, which says all and is used again, without ``calibration``.
        calibration: Batches: each a tensor, a tuple of positional or a mapping of keyword inputs. 16 sequences do. It
            has to be given.
        fit: Whether coders are fitted; if not, batches only show the shapes (one is enough), codebooks are random, and
            are trained or loaded by ``load_state_dict`` afterwards.
        inplace: Rewrite ``model`` itself. Otherwise it is left untouched, and the result shares no tensor with it.
        seed: Of the codebooks, and of the directions in which outputs are changed; left out, 0, and random codebooks
            are drawn from torch's global generator.
        progress: Called with (done, total, what); True or False for a line on standard error or none.

    Where this raises anything, an interrupt (Ctrl-C) among it, ``model`` is as it was, also with ``inplace``.

    Returns:
        The rewritten model.

    Raises:
        InputError: If the model rejects a batch, there is none, or one is empty or not finite.
        RewriteError: If there is no attention, or none ran, or the model is in DistributedDataParallel, sharded or
            split over processes.
        PolicyError: If a rule matches no layer, or a layer cannot follow its policy.
        FormatError: If a file of a calibration is truncated, altered or none.
        OSError: If it cannot be read.
    """
    check_model(model, "quantize_kv")
    refuse_distributed(model, "quantize_kv")
    if isinstance(policy, (str, bytes, os.PathLike)):
        _check_alone(calibration, fit, seed)
        flag("inplace", inplace, error=InputError)
        check_progress(progress)
        return _with_saved(model, opened(policy), inplace)
    policy = KVPolicy() if policy is None else policy
    check_policy(policy, KVPolicy)
    flag("fit", fit, error=InputError)
    flag("inplace", inplace, error=InputError)
    if seed is not None:
        check_seed(seed)
    check_progress(progress)
    if calibration is None:
        raise InputError(
            "quantize_kv needs calibration, batches of the model's inputs (16 sequences do), to see which keys and "
            "values there are: quantize_kv(model, policy, calibration=batches)"
        )
    _check_dense(model)
    before = Snapshot(model, values=small_tensors(model) if inplace else ())
    try:
        batches = calibration_of(calibration)
        with torch.inference_mode(False):  # what is made in it could not be trained
            small = model if inplace else copy_model(model)
            _rewrite(small, policy, batches, fit, seed, shown(progress, quiet=False))
        return small
    except BaseException:
        before.restore()
        raise


def _check_dense(model: nn.Module) -> None:
    if attentions(model):
        raise RewriteError("this model already attends to codes; start from the model before quantize_kv")


def _check_alone(calibration: Any, fit: bool, seed: int | None) -> None:
    """Refuses arguments that a saved calibration already decides."""
    given = {"calibration": calibration is not None, "fit": fit is not True, "seed": seed is not None}
    if any(given.values()):
        name = next(name for name, there in given.items() if there)
        raise InputError(
            f"{name}= would do nothing beside a saved calibration, whose coders are fitted; leave it out, or give a "
            "KVPolicy to fit others"
        )


def _with_saved(model: nn.Module, saved: SavedCalibration, inplace: bool) -> nn.Module:
    """Returns a model that attends as a saved calibration says."""
    _check_dense(model)
    saved.check(model)
    before = Snapshot(model, values=small_tensors(model) if inplace else ())
    try:
        with torch.inference_mode(False):
            small = model if inplace else copy_model(model)
            saved.put(small)
        return small
    except BaseException:
        before.restore()
        raise


def commitment(model: nn.Module) -> torch.Tensor:
    """Returns the sum of the quantisers' losses of the last call in training, to be added to the model's own loss.

    Args:
        model: What ``quantize_kv`` returned, or a model that holds it.

    Raises:
        InputError: If no attention on codes has run in training mode in this thread, or one ran without recording
            gradients though they are wanted now.
    """
    ran = [core for core in attentions(model).values() if core.loss is not None]
    losses = [core.loss for core in ran if core.loss is not None]
    if not losses:
        raise InputError("no attention on codes has run in training mode; call model.train() and run it first")
    blind = next((core.name for core in ran if not core.underway.recorded), None)
    if blind is not None and torch.is_grad_enabled():
        raise InputError(
            f"{blind} ran without recording gradients, so its loss has none; where checkpointing did that, give it "
            "use_reentrant=False (gradient_checkpointing_kwargs of transformers), and for the number alone call "
            "commitment under torch.no_grad()"
        )
    return torch.stack(losses).sum()


def _rewrite(
    model: nn.Module,
    policy: KVPolicy,
    calibration: Iterable[Any],
    fit: bool,
    seed: int | None,
    progress: Progress | None,
) -> None:
    batches = Batches(model, calibration)
    policies = chosen_sites(model, policy, batches)
    cores = {site: KVAttention(own, site.name, site.products) for site, own in policies.items()}
    for site, core in cores.items():
        wrap(site, core)
    cores, sharing = tried(model, cores, batches)
    for core in cores.values():
        core.watch = Watch(bool(core.policy.joint), _STEP if core.policy.transform else _STEP_OWN)
    try:
        with evaluating(model):
            _look(model, batches, fit, seed or 0, progress)
    finally:
        watched = {core: core.watch for core in cores.values()}
        for core in watched:
            core.watch = None
    seen: dict[KVAttention, Watch] = {}
    for site, core in cores.items():
        watch = watched[core]
        assert watch is not None
        if watch.keys.count and core not in sharing:
            with drawn_from(None if fit else seed, core.name, [watch.keys.device or torch.device("cpu")]):
                core.keys, core.values = _coder(core, watch.keys, keys=True), _coder(core, watch.values, keys=False)
            seen[core] = watch
        elif core not in sharing:
            unwrap(site)
    if not seen:
        raise RewriteError("no attention module ran on the calibration batches; skip none, or calibrate with others")
    for bits in dict.fromkeys(core.policy.bits_per_value for core in seen):
        with drawn_from(None if fit else seed, f"{bits} bits", {t.device for t in model.parameters()}):
            _fit({core: watch for core, watch in seen.items() if core.policy.bits_per_value == bits}, fit, seed or 0)
    for core, source in sharing.items():
        core.keys, core.values = source.keys, source.values
    for site, core in cores.items():
        core.train(site.module.training)
    without_nested_tensors(model, [site.module for site in cores])
    adapt_pretrained(model)
    adapt_generation(model)


def _look(model: nn.Module, batches: Batches, fit: bool, seed: int, progress: Progress | None) -> None:
    """Runs the batches; with gradients of outputs in the keys and values where coders are to be fitted."""
    if not fit:
        with torch.no_grad():
            batches.runs[0]()
        if progress is not None:
            progress(1, 1, "reading shapes")
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for number, run in enumerate(batches.runs):
            with torch.enable_grad():
                loss = probe(run(), seed + number)
                if loss is not None and loss.requires_grad:
                    loss.backward()
            if progress is not None:
                progress(number + 1, len(batches.runs), f"reading keys and values, batch {number + 1}")
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _coder(core: KVAttention, moments: Moments, *, keys: bool) -> HeadCoder:
    policy, width = core.policy, moments.heads * moments.dim // moments.parts
    if width % policy.codebook_dim:
        raise PolicyError(
            f"{core.name}: sub-vectors of {policy.codebook_dim} do not divide {width} channels; "
            "take a codebook_dim that does, or skip it with a KVRule"
        )
    assert policy.beam is not None  # a policy sets it when it is made
    stages = max(1, round(policy.bits_per_value * policy.codebook_dim / policy.codebook_bits))
    return HeadCoder(
        moments.heads, moments.dim, codebook_dim=policy.codebook_dim, codebook_size=policy.codebook_size, stages=stages,
        transform=policy.transform, joint=bool(policy.joint), strided=policy.strided and keys,
        normalize=policy.normalize, use_cosine_sim=policy.use_cosine_sim, beam=policy.beam, decay=policy.decay,
        device=moments.device,
    )  # fmt: skip


def _fit(seen: dict[KVAttention, Watch], fit: bool, seed: int) -> None:
    """Fits coders that share a budget."""
    coders: list[HeadCoder] = []
    moments: list[Moments] = []
    for core, watch in seen.items():
        assert core.keys is not None and core.values is not None
        coders += [core.keys, core.values]
        moments += [watch.keys, watch.values]
    policy = next(iter(seen)).policy
    if not policy.transform:
        for coder, own in zip(coders, moments, strict=True) if fit else ():
            coder.fit(own.all_samples(), seed=seed)
        return
    assert policy.stages is not None  # with a transform they are limited
    share_codebooks(coders, policy.stages)
    if fit:
        spaces = [find_space(coder, own) for coder, own in zip(coders, moments, strict=True)]
        fit_coders(coders, spaces, policy.bits_per_value, policy.stages, seed=seed)
