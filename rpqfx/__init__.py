"""Rewrite a PyTorch model so that its weights live in codebooks, and use them straight from there."""

from rpqfx import errors, graph, kv, nn, reroute
from rpqfx._api import rpqify
from rpqfx.codebook import CodebookSpec
from rpqfx.errors import RPQError
from rpqfx.finetune import finetune
from rpqfx.inductor import inductor_options
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
