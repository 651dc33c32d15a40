"""The rewrite that makes a model's blocks conditionally routed."""

from rpqfx.reroute.chooser import Chooser
from rpqfx.reroute.policy import RoutePolicy, RouteRule
from rpqfx.reroute.rewrite import route, routed

__all__ = ["Chooser", "RoutePolicy", "RouteRule", "route", "routed"]
