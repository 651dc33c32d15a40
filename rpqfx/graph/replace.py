"""Step three: replace, by the least intrusive means.

A torch.nn layer becomes its RPQ namesake; any other module keeps its class, and its Parameter becomes a
quantized one that it reads under the same name. Either way the module stays the same object, with its hooks,
flags, attributes and methods, so nothing that refers to it has to be found and mended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from rpqfx.codebook import CodebookSpec, pack_signs, unpack_signs
from rpqfx.errors import InputError, RewriteError
from rpqfx.fit import fit_codebooks
from rpqfx.graph.bytecode import needs_tensors
from rpqfx.graph.module_graphs import Captured
from rpqfx.graph.presence import check_loaded
from rpqfx.graph.records import record
from rpqfx.graph.seeds import drawn_from
from rpqfx.graph.sites import find_sites
from rpqfx.graph.snapshot import Snapshot
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.graph.validate import groups_of, layout_of, settle
from rpqfx.nn import RPQLinear, RPQMultiheadAttention
from rpqfx.nn.hosting.host import back, backed_as, layer_for
from rpqfx.nn.hosting.reparametrised import computed_from
from rpqfx.nn.layer import random_weight
from rpqfx.nn.weight import ReadAs, RPQWeight
from rpqfx.policies.decision import KeepDense, Quantize
from rpqfx.policies.site import Site
from rpqfx.reporting.progress import Progress


def rewrite(
    captured: Captured,
    decisions: Mapping[str, CodebookSpec | Quantize | KeepDense],
    sites: Sequence[Site] | None = None,
    *,
    seed: int | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Carries out decisions on ``captured.model``, in place.

    Everything is checked and every codebook is made before the model is touched: if anything is refused or raised, the
    model is as it was.

    Args:
        captured: The model that was read.
        decisions: By site name; sites without one are left alone.
        sites: What ``find_sites(captured)`` returned, where that is at hand.
        seed: Of fits (0 if left out) and of random codebooks (from torch's global generator if left out).
        progress: Called with (done, total, site name) after each site.

    Returns:
        ``captured.model``.

    Raises:
        RewriteError: If a decision names no site, or one that cannot be rewritten, or does not fit it, or a weight has
            not been loaded while others have.
        PolicyError: If a spec fits neither side of its site.
        InputError: If there is a seed, but all is on the meta device, where nothing is drawn.
    """
    before = Snapshot(captured.model)
    try:
        return _rewrite(captured, decisions, find_sites(captured) if sites is None else sites, seed, progress)
    except BaseException:
        before.restore()
        raise


def _rewrite(
    captured: Captured, decisions: Mapping[str, CodebookSpec | Quantize | KeepDense], sites: Sequence[Site],
    seed: int | None, progress: Progress | None,
) -> nn.Module:  # fmt: skip
    settled = settle(decisions, sites)
    check_loaded(captured.model, sites, settled)
    by_name = {site.name: site for site in sites}
    held = {name: decision for name, decision in settled.items() if isinstance(decision, Quantize)}
    made: dict[str, RPQWeight] = {}
    errors: dict[str, float | None] = {}
    if seed is not None and held and all(parameter_at(captured.model, name).is_meta for name in held):
        raise InputError(
            f"seed={seed} would do nothing: the model is on the meta device, where nothing is drawn; call "
            "torch.manual_seed before rpqfx.materialize"
        )
    for group in groups_of(held).values():
        with drawn_from(seed, group[0], [parameter_at(captured.model, name).device for name in group]):
            weights = _make(captured.model, [(by_name[name], held[name]) for name in group], seed or 0)
        for name, weight in zip(group, weights, strict=True):
            made[name], errors[name] = weight, _error(captured.model, by_name[name], held[name], weight)
            if progress is not None:
                progress(len(made), len(held), name)
    put(captured.model, sites, made)
    adapt_pretrained(captured.model)
    record(captured.model, sites, settled, errors)
    return captured.model


def put(model: nn.Module, sites: Sequence[Site], made: Mapping[str, RPQWeight]) -> None:
    """Puts quantized tensors in their places, all of them or, where one cannot be, none.

    Args:
        model: The model.
        sites: All its sites.
        made: By site name.

    Raises:
        RewriteError: If a module cannot take on its codebooks.
    """
    by_name = {site.name: site for site in sites}
    _check_owners(model, [by_name[name] for name in made])
    for name, weight in made.items():
        weight.read_as = _reader(model, by_name[name])
        weight.plain_when_compiled = by_name[name].plain_when_compiled
    install_all(model, [(by_name[name].names, weight) for name, weight in made.items()])


def install(model: nn.Module, names: Sequence[str], weight: RPQWeight) -> None:
    """Puts one quantized tensor in the place of a Parameter, under all its names.

    Args:
        model: The model.
        names: Qualified names of the Parameter.
        weight: Its codebooks; the same object everywhere, so that what was tied stays tied.

    Raises:
        RewriteError: If a module cannot take on its codebooks. Whatever is raised, the model is then as it was.
    """
    before = Snapshot(model)
    try:
        install_all(model, [(names, weight)])
    except BaseException:
        before.restore()
        raise


def install_all(model: nn.Module, placed: Iterable[tuple[Sequence[str], RPQWeight]]) -> None:
    """``install`` for many tensors, each module taking on all of its own at once (its class is made once).

    Args:
        model: The model.
        placed: Names and codebooks of each tensor.
    """
    paths: dict[nn.Module, str] = {}
    owned: dict[nn.Module, dict[str, RPQWeight]] = defaultdict(dict)
    for names, weight in placed:
        for name in names:
            path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(path)
            paths.setdefault(owner, path)
            owned[owner][attribute] = weight
    for module, weights in owned.items():
        path = paths[module]
        back(module, weights)
        for attribute in weights:
            source = computed_from(model, path, attribute)[0]
            _forget_flat_weights(module if source == path else model.get_submodule(source))
        above, _, own = path.rpartition(".")
        parent = model.get_submodule(above) if own == "out_proj" else None
        if type(parent) is nn.MultiheadAttention and isinstance(parent.out_proj, RPQLinear):
            parent.__class__ = RPQMultiheadAttention  # its forward calls out_proj rather than reading its weight


def _reader(model: nn.Module, site: Site) -> ReadAs:
    """Returns the kind of value that reading the tensor from its layer has to give.

    torch.nn's encoder layers read the weights of their children for a fast path, which they take with plain tensors
    only and which gives padded positions other values. A layer of torch.nn does not read its own weight.
    """
    for path in site.module_names:
        parents = [path.rsplit(".", up)[0] for up in range(1, path.count(".") + 1)] + [""] if path else []
        if any(isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer) for parent in parents):
            return "tensor"
    if any(needs_tensors(reader) for reader in site.readers):
        return "expanded"
    owners = [type(model.get_submodule(path)) for path in site.module_names]
    return "virtual" if site.read_outside or any(layer_for(owner) is None for owner in owners) else "expanded"


def _forget_flat_weights(module: nn.Module) -> None:
    """Empties the list in which a parametrised recurrent layer would keep the dense tensor until its next call."""
    if isinstance(module, nn.RNNBase) and "_flat_weights" in module.__dict__:
        module._flat_weights = [None] * len(module._flat_weights_names)


def _check_owners(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises before anything is touched where a module cannot take on its codebooks."""
    owned: dict[nn.Module, set[str]] = defaultdict(set)
    for name in (name for site in sites for name in site.names):
        path, _, attribute = name.rpartition(".")
        owned[model.get_submodule(path)].add(attribute)
    for module, names in owned.items():
        backed_as(module, names)


def parameter_at(model: nn.Module, name: str) -> nn.Parameter:
    """The dense Parameter of a qualified name."""
    path, _, attribute = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters.get(attribute)
    if parameter is None:
        raise RewriteError(f"{name} is not a dense Parameter of the model any more")
    return parameter


def _make(model: nn.Module, members: list[tuple[Site, Quantize]], seed: int) -> list[RPQWeight]:
    weights = []
    for site, decision in members:
        layout = layout_of(site, decision)
        path, _, attribute = site.name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = parameter_at(model, site.name)
        fitted = decision.init == "fit" and not parameter.is_meta
        if fitted and not bool(torch.isfinite(parameter).all()):
            raise RewriteError(f"{site.name} has infinite or NaN elements; mend it, or skip it with a Rule")
        if fitted and len(members) == 1:
            weight = RPQWeight.from_dense(parameter, decision.spec, layout, seed=seed, plan=decision.plan)
        else:
            weight = random_weight(owner, attribute, decision.spec, layout, site.std, decision.plan)
        weight.take_notes(parameter)
        weights.append(weight)
    if len(members) > 1:
        _share(model, members, weights, seed)
    return weights


def _share(model: nn.Module, members: list[tuple[Site, Quantize]], weights: list[RPQWeight], seed: int) -> None:
    """One set of codebooks for several weights; fitted ones are fitted to all of them together."""
    first = weights[0]
    specs = [decision.spec for _, decision in members]
    parameters = [parameter_at(model, site.name) for site, _ in members]
    dtypes = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(dtypes) > 1:
        names = ", ".join(site.name for site, _ in members)
        raise RewriteError(f"{names} cannot share codebooks: their dtypes or devices differ")
    for weight in weights:
        weight.codebooks, weight.shares_codebooks = first.codebooks, True
    if members[0][1].init != "fit" or first.codebooks.is_meta:
        return
    whole = CodebookSpec(
        sum(spec.num_vectors for spec in specs), specs[0].dim, specs[0].codebook_dim, specs[0].entries,
        specs[0].stages, specs[0].num_codebooks, specs[0].scale, specs[0].signs,
    )  # fmt: skip
    rows = [w.layout.to_vectors(p.detach()) for w, p in zip(weights, parameters, strict=True)]
    fit = fit_codebooks(torch.cat(rows), whole, seed=seed)
    with torch.no_grad():
        first.codebooks.copy_(fit.codebooks)
        sizes = [spec.num_vectors for spec in specs]
        for weight, codes in zip(weights, fit.codes.split(sizes, -1), strict=True):
            weight.codes = codes.to(weight.spec.code_dtype)
        if fit.signs is not None:
            each = unpack_signs(fit.signs, sum(sizes)).split(sizes, -1)
            for weight, minus in zip(weights, each, strict=True):
                assert weight.signs is not None
                weight.signs.copy_(pack_signs(minus))
        if fit.scale is not None:
            for weight, scale in zip(weights, fit.scale.split(sizes), strict=True):
                assert weight.scale is not None
                weight.scale.copy_(scale)


@torch.no_grad()
def _error(model: nn.Module, site: Site, decision: Quantize, weight: RPQWeight) -> float | None:
    """Relative error of a fitted tensor, ``|W - W'| / |W|``; None where nothing was fitted."""
    dense = parameter_at(model, site.name)
    if decision.init != "fit" or dense.is_meta:
        return None
    norm = dense.float().norm()
    return float((dense.float() - weight().float()).norm() / norm) if norm > 0 else 0.0
