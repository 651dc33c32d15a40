"""The rewrite that makes a model's blocks conditionally routed."""

from rpqfx.routing.rewrite.chooser import Chooser
from rpqfx.routing.rewrite.policy import RoutePolicy, RouteRule
from rpqfx.routing.rewrite.rewrite import route, routed
from rpqfx.routing.rewrite.route_report import RouteReport, report_routes

__all__ = ["Chooser", "RoutePolicy", "RouteReport", "RouteRule", "report_routes", "route", "routed"]
