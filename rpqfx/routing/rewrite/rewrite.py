"""route: capture, decide, and hook a model's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.errors import InputError, PolicyError, RewriteError
from rpqfx.graph.calibration.batches import calibration_of
from rpqfx.graph.copying import copy_model
from rpqfx.graph.module_graphs import capture
from rpqfx.graph.nested_tensors import without_nested_tensors
from rpqfx.graph.snapshot import Snapshot
from rpqfx.graph.transformers_models import adapt_pretrained
from rpqfx.nn.wrappers import modules_within, refuse_distributed
from rpqfx.policies.arguments import check_model, check_policy
from rpqfx.policies.name_rules import check_rules
from rpqfx.routing.rewrite.attention import AttentionRoute, TorchAttentionRoute, named
from rpqfx.routing.rewrite.call_state import Padding
from rpqfx.routing.rewrite.chooser import Chooser
from rpqfx.routing.rewrite.feedforward import FeedForwardRoute
from rpqfx.routing.rewrite.find import Block, find_blocks
from rpqfx.routing.rewrite.fitted import fit_branches
from rpqfx.routing.rewrite.policy import LIGHT_WINDOW, RoutePolicy
from rpqfx.routing.rewrite.seeds import Drawing
from rpqfx.routing.windows import LocalAttention
from rpqfx.validation.values import check_seed, flag

ROUTE = "routed"  # the attribute under which a block's last layer, or an attention module, holds what routes it
POLICY = "_rpqfx_route"  # the attribute of a routed model that says how it was routed
_HEAD = 64


def route(
    model: nn.Module,
    policy: RoutePolicy | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    inplace: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Returns a copy of a model, or with ``inplace`` the model itself, with blocks and attention routed conditionally.

    Each block found becomes the heavy branch, with its own weights, for the tokens that a router chooses; a light
    branch for all tokens, whose last layer starts at zero, is added to it (CoLT5, Ainslie et al., 2023,
    arXiv:2303.09752). Where as many tokens are chosen as there are, the result equals the model exactly until it is
    trained. With ``RoutePolicy(light_init="fit")`` the light branches of feed-forward blocks, and their routers, are
    fitted to ``calibration`` instead, and stand in for the heavy branches; then it equals the model after training of
    routers and light branches, too. Modules stay what and where they are: hooks of the block's own layers do the
    routing, and the new Parameters lie under ``routed`` of its last layer, or of the attention module.

    Found are linear layers with something that is not linear between them, gated ones too, in any module's code; and
    attention as [`quantize_kv`][rpqfx.quantize_kv] finds it, if it is of a sequence to itself.

    Args:
        model: Any model, one that ``rpqify`` returned too.
        policy: ``RoutePolicy()`` if left out.
        calibration: Batches of the model's inputs, each a tensor, a tuple of positional inputs or a mapping of keyword
            inputs, where the policy has ``light_init="fit"``; all run twice, in eval mode. Not of a model on the meta
            device, whose light branches are loaded like all else.
        inplace: Rewrite ``model`` itself. Otherwise it is left untouched, and the result shares no tensor with it.
        seed: Of the new Parameters.

    Where this raises anything, an interrupt (Ctrl-C) among it, ``model`` is as it was, also with ``inplace``.

    Returns:
        The rewritten model.

    Raises:
        InputError: If it is no module; or if calibration is missing or would do nothing, is rejected by the model, not
            finite, or reaches a block not at all.
        RewriteError: If there is nothing to route, or the model is routed already, in DistributedDataParallel, sharded
            or split over processes.
        PolicyError: If a rule matches no block, or the model is causal and the policy has neither ``window`` nor
            ``look_ahead``.
    """
    check_model(model, "route")
    policy = RoutePolicy() if policy is None else policy
    check_policy(policy, RoutePolicy)
    flag("inplace", inplace, error=InputError)
    check_seed(seed)
    refuse_distributed(model, "route")
    batches = _batches(model, policy, calibration)
    if routed(model):
        raise RewriteError("this model is routed already; start from the model before route")
    before = Snapshot(model, also=_configs(model))
    try:
        return _route(model if inplace else copy_model(model), policy, seed, batches)
    except BaseException:
        before.restore()
        raise


def _batches(model: nn.Module, policy: RoutePolicy, calibration: Iterable[Any] | None) -> list[Any]:
    """Calibration batches, as many as are needed."""
    fits, empty = policy.light_init == "fit", any(parameter.is_meta for parameter in model.parameters())
    if calibration is not None and not fits:
        raise InputError("calibration would do nothing with light_init='zero'; leave it out, or give light_init='fit'")
    if calibration is not None and empty:
        raise InputError(
            "calibration would do nothing: the model is on the meta device, where nothing runs; route it where it has "
            "values, or leave calibration out and load them"
        )
    if calibration is None and fits and not empty:
        raise InputError(
            "light_init='fit' fits light branches to calibration batches of the model's inputs, got none: "
            "route(model, policy, calibration=batches)"
        )
    return [] if calibration is None else calibration_of(calibration)


def _route(small: nn.Module, policy: RoutePolicy, seed: int, batches: Sequence[Any]) -> nn.Module:
    """Routes a model in place; where this raises, it may be anything."""
    blocks = _decide(find_blocks(capture(small)), policy)
    padding = Padding()
    with Drawing(seed):
        made = [(block, _make(block, number, policy, padding)) for block, number in blocks]
    for block, new in made:
        _install(block, new)
    without_nested_tensors(small, [block.last for block, _ in made])
    small.register_forward_pre_hook(_Note(padding), with_kwargs=True)
    small.register_forward_hook(_Forget(padding), always_call=True)
    if any(block.kind == "attention" for block, _ in blocks):
        _without_cache(small)
    placed = [(block, new) for block, new in made if isinstance(new, FeedForwardRoute)]
    if policy.light_init == "fit" and not placed:
        raise PolicyError("light_init='fit' would do nothing: no feed-forward block is routed; leave it out")
    if batches:
        fit_branches(small, placed, batches)
    small.__dict__[POLICY] = policy
    adapt_pretrained(small)
    return small


def routed(model: nn.Module) -> dict[str, FeedForwardRoute | AttentionRoute]:
    """The routes of a model's blocks, by the names that rules match; empty if it is not routed."""
    found = [module for module in model.modules() if isinstance(module, (FeedForwardRoute, AttentionRoute))]
    return {module.name: module for module in found}


def routing_of(model: nn.Module) -> dict[str, RoutePolicy]:
    """Returns how a model and parts of it were routed, by the names of what ``route`` was called with.

    Args:
        model: Any model; its own name is empty.
    """
    named = {name: module.__dict__.get(POLICY) for name, _, module in modules_within(model)}
    return {name: policy for name, policy in named.items() if isinstance(policy, RoutePolicy)}


def _decide(blocks: Sequence[Block], policy: RoutePolicy) -> list[tuple[Block, int | float]]:
    """The blocks to be routed, with their numbers of heavy tokens."""
    if not blocks:
        raise RewriteError(
            "nothing to route was found: no linear layers with an activation between them, no module whose forward "
            "calls scaled_dot_product_attention, no torch.nn.MultiheadAttention, no attention of transformers"
        )
    check_rules(policy.rules, [block.name for block in blocks], "block")
    decided = [(block, policy.of(block.name, block.kind)) for block in blocks]
    taken = [(b, number) for b, number in decided if not isinstance(number, str) and b.obstacle is None]
    if not taken:
        why = "; ".join(f"{b.name}: {said if isinstance(said, str) else b.obstacle}" for b, said in decided[:4])
        raise RewriteError(f"no block is routed: {why}")
    for block, _ in taken:
        if hasattr(block.last, ROUTE):
            raise RewriteError(f"{block.name} already has an attribute {ROUTE!r}; skip it with a RouteRule")
    causal = next((block.name for block in blocks if block.causal), None)
    if causal is not None and policy.window is None and not policy.look_ahead:
        raise PolicyError(
            f"{causal} is causal, and a choice among all tokens would depend on later ones; give a window "
            "(RoutePolicy(window=64)), or look_ahead=True if that does no harm"
        )
    return taken


def _make(
    block: Block, number: int | float, policy: RoutePolicy, padding: Padding
) -> FeedForwardRoute | AttentionRoute:
    width_in, width_out = _widths(block)
    like = next((p for p in block.last.parameters() if p.is_floating_point()), None)
    made: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
    chooser = Chooser(width_in, number, policy.window, padding, policy.router, **made)
    light: nn.Module | None = None
    if block.kind == "feed_forward":
        hidden = int(width_in * policy.light)
        if hidden:
            last = _zero(nn.Linear(hidden, width_out, **made))
            light = nn.Sequential(nn.Linear(width_in, hidden, **made), nn.GELU(), last)
        return FeedForwardRoute(chooser, light, block.name, block.time_first, policy.light_init == "fit")
    if policy.light:
        head = min(_HEAD, width_in)
        heads = max(1, round(width_in * policy.light / head))
        causal = policy.window is not None
        light = LocalAttention(
            width_in, dim_head=head, heads=heads, window_size=policy.light_window or LIGHT_WINDOW, causal=causal, **made
        )
        _zero(light.to_out)
    kind = TorchAttentionRoute if isinstance(block.last, nn.MultiheadAttention) else AttentionRoute
    return kind(chooser, light, block.name)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def _widths(block: Block) -> tuple[int, int]:
    """Of tokens before and behind a block."""
    if block.kind == "feed_forward":
        return _sizes(block.first[0])[0], _sizes(block.last)[1]
    if isinstance(block.last, nn.MultiheadAttention):
        return block.last.embed_dim, block.last.embed_dim
    layers = [module for module in block.last.modules() if isinstance(module, nn.Linear) or hasattr(module, "nf")]
    if not layers:
        raise RewriteError(f"{block.name}: no linear layer shows the width of tokens; skip it with a RouteRule")
    width = _sizes(layers[0])[0]
    return width, width


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rows, columns = layer.get_parameter("weight").shape  # transformers' Conv1D
    return rows, columns


def _install(block: Block, new: FeedForwardRoute | AttentionRoute) -> None:
    block.last.add_module(ROUTE, new.train(block.last.training))
    if isinstance(new, AttentionRoute):
        block.last.register_forward_pre_hook(new.before, with_kwargs=True)
        block.last.register_forward_hook(new.after, with_kwargs=True)
        return
    for i, layer in enumerate(block.first):
        layer.register_forward_pre_hook(new.another if i else new.first)
    block.last.register_forward_hook(new.last)


class _Note:
    """Hook before the model: notes its mask of padding."""

    def __init__(self, padding: Padding) -> None:
        self.padding = padding

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Of transformers (1 for tokens) or of torch (True for padding)."""
        given = named(module, args, kwargs)
        ours, theirs = given.get("attention_mask"), given.get("src_key_padding_mask")
        if isinstance(ours, Tensor) and ours.dim() == 2:
            self.padding.mask = ours.bool()
        elif isinstance(theirs, Tensor) and theirs.dtype == torch.bool and theirs.dim() == 2:
            self.padding.mask = ~theirs


class _Forget:
    """Hook behind the model."""

    def __init__(self, padding: Padding) -> None:
        self.padding = padding

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        """Drops the mask."""
        self.padding.mask = None


def _without_cache(model: nn.Module) -> None:
    """Has models of transformers make no cache unless they are told to."""
    for config in _configs(model):
        if getattr(config, "use_cache", False):
            config.use_cache = False


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of models of transformers, each once."""
    names = ("config", "generation_config")
    found = [getattr(module, name, None) for module in model.modules() for name in names]
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())
