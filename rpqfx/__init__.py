"""Rewrite a PyTorch model so that its weights live in codebooks, and use them straight from there."""

from typing import Any as _Any

from rpqfx import errors, graph, kv, nn, routing
from rpqfx.codebook import CodebookSpec
from rpqfx.conversion.check import check_outputs
from rpqfx.conversion.convert import convert
from rpqfx.conversion.dequantize import dequantize
from rpqfx.conversion.rpqify import rpqify
from rpqfx.errors import RPQError
from rpqfx.integrations.arrival import register_on_arrival as _register_on_arrival
from rpqfx.kv.policy import KVPolicy, KVRule
from rpqfx.kv.rewrite import quantize_kv
from rpqfx.ops.cpu.prepare import load_kernels
from rpqfx.ops.inductor import inductor_options
from rpqfx.policies.policy import Budget, Fixed, KeepDense, Policy, Quantize, Rate, Rule
from rpqfx.policies.site import Site
from rpqfx.reporting.report import Report, report
from rpqfx.routing.rewrite.policy import RoutePolicy, RouteRule
from rpqfx.routing.rewrite.rewrite import route
from rpqfx.routing.rewrite.route_report import report_routes
from rpqfx.storage.kv_calibration import save_calibration
from rpqfx.storage.materialize import materialize
from rpqfx.storage.serialize import load, save
from rpqfx.timing.tune import tune
from rpqfx.training.finetune import finetune
from rpqfx.training.recoding import Recoding
from rpqfx.training.routes import finetune_routes

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CodebookSpec",
    "Fixed",
    "KVPolicy",
    "KVRule",
    "KeepDense",
    "Policy",
    "Quantize",
    "RPQError",
    "Rate",
    "Recoding",
    "Report",
    "RoutePolicy",
    "RouteRule",
    "Rule",
    "Site",
    "check_outputs",
    "convert",
    "dequantize",
    "errors",
    "finetune",
    "finetune_routes",
    "graph",
    "inductor_options",
    "kv",
    "load",
    "load_kernels",
    "materialize",
    "nn",
    "quantize_kv",
    "report",
    "report_routes",
    "route",
    "routing",
    "rpqify",
    "save",
    "save_calibration",
    "tune",
]

_register_on_arrival()


def __getattr__(name: str) -> _Any:
    """Imports ``RPQConfig``, and transformers with it, when it is asked for."""
    if name != "RPQConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rpqfx.integrations.config import RPQConfig

    return RPQConfig
