"""Find, decide, replace: the three steps of a rewrite, one to call and read at a time."""

from rpqfx.graph.leaves import leaf
from rpqfx.graph.module_graphs import Captured, ModuleGraph, capture
from rpqfx.graph.replace import install, rewrite
from rpqfx.graph.single_graph import whole_graph
from rpqfx.graph.sites import find_sites, is_rewritten
from rpqfx.policies.site import Site

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
