"""Chooses the attention modules of a model that will use codes, and their policies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rpqfx.errors import PolicyError, RewriteError
from rpqfx.graph.attention import AttentionSite, find_attention, with_written
from rpqfx.graph.calibration.batches import Batches
from rpqfx.graph.module_graphs import capture, evaluating
from rpqfx.kv.policy import KVPolicy
from rpqfx.policies.name_rules import check_rules


def chosen_sites(model: nn.Module, policy: KVPolicy, batches: Batches) -> dict[AttentionSite, KVPolicy]:
    """Returns the attention modules that a policy does not skip, each with its own policy.

    Args:
        model: The model, which runs once.
        policy: The policy of the whole model.
        batches: Batches of its inputs.

    Raises:
        InputError: If the model rejects the first batch.
        PolicyError: If a rule matches no module, or all are skipped.
        RewriteError: If there is no attention, or some that is computed in a way that is not known here.
    """
    with evaluating(model), torch.no_grad():
        sites, ahead = with_written(model, find_attention(capture(model)), batches.runs[0])
    if not sites and ahead is not None:
        raise RewriteError(
            f"there is no attention that a cache serves; of {ahead or 'the model'}: in calibration batch 0 its tokens "
            "attend to later ones, so that no cache is filled token by token; where a decoder hides them only in calls "
            "without a cache, calibrate with use_cache=False"
        )
    return _decide(sites, policy)


def _decide(sites: Sequence[AttentionSite], policy: KVPolicy) -> dict[AttentionSite, KVPolicy]:
    if not sites:
        raise RewriteError(
            "no attention was found: no module's forward calls scaled_dot_product_attention, there is no "
            "torch.nn.MultiheadAttention and no attention module of transformers, and none multiplies queries by keys "
            "and, after a softmax over earlier tokens alone, weights by values"
        )
    check_rules(policy.rules, [site.name for site in sites], "attention module")
    beyond = [layer for layer in policy.skip_layers if not -len(sites) <= layer < len(sites)]
    if beyond:
        raise PolicyError(f"skip_layers has {beyond[0]}, and the model has {len(sites)} attention modules, from 0")
    skipped = {layer % len(sites) for layer in policy.skip_layers}
    decided = {site: policy.of(site.name) for number, site in enumerate(sites) if number not in skipped}
    held = {site: own for site, own in decided.items() if isinstance(own, KVPolicy)}
    if not held:
        raise PolicyError("rules and skip_layers skip every attention module; there is nothing to do")
    strange = next((site for site in held if site.obstacle is not None), None)
    if strange is not None:
        raise RewriteError(
            f"{strange.name or 'the model'} {strange.obstacle}; attention is computed on codes where a module "
            "multiplies queries by keys, takes the softmax over keys, and multiplies its weights by values; skip it "
            "with a KVRule"
        )
    return held
