"""Rewrite a PyTorch model so that its weights live in codebooks, and use them straight from there."""

from typing import Any as _Any

from rpqfx import errors, graph, kv, nn, reroute
from rpqfx._api import rpqify
from rpqfx.codebook import CodebookSpec
from rpqfx.errors import RPQError
from rpqfx.finetune import finetune
from rpqfx.inductor import inductor_options
from rpqfx.integrations.arrival import register_on_arrival as _register_on_arrival
from rpqfx.kv.policy import KVPolicy, KVRule
from rpqfx.kv.rewrite import quantize_kv
from rpqfx.materialize import materialize
from rpqfx.policy import Hold, Policy, Rule, Skip
from rpqfx.report import Report, report
from rpqfx.reroute.policy import RoutePolicy, RouteRule
from rpqfx.reroute.rewrite import route
from rpqfx.serialize import load, save
from rpqfx.site import Site
from rpqfx.tune import tune

__version__ = "0.1.0"

__all__ = [
    "CodebookSpec",
    "Hold",
    "KVPolicy",
    "KVRule",
    "Policy",
    "RPQError",
    "Report",
    "RoutePolicy",
    "RouteRule",
    "Rule",
    "Site",
    "Skip",
    "errors",
    "finetune",
    "graph",
    "inductor_options",
    "kv",
    "load",
    "materialize",
    "nn",
    "quantize_kv",
    "report",
    "reroute",
    "route",
    "rpqify",
    "save",
    "tune",
]

_register_on_arrival()


def __getattr__(name: str) -> _Any:
    """Imports ``RPQConfig``, and transformers with it, when it is asked for."""
    if name != "RPQConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rpqfx.integrations.transformers import RPQConfig

    return RPQConfig
