"""Find, decide, replace: the three steps of a rewrite, one to call and read at a time."""

from rpqfx.graph.capture import Captured, ModuleGraph, capture
from rpqfx.graph.leaves import leaf
from rpqfx.graph.match import find_sites, is_rewritten
from rpqfx.graph.rewrite import install, rewrite
from rpqfx.graph.whole import whole_graph
from rpqfx.site import Site

__all__ = [
    "Captured",
    "ModuleGraph",
    "Site",
    "capture",
    "find_sites",
    "install",
    "is_rewritten",
    "leaf",
    "rewrite",
    "whole_graph",
]
