"""How a model's blocks are routed: values that say it, and nothing that does it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rpqfx.errors import PolicyError, SpecError
from rpqfx.policies.base import PolicyBase
from rpqfx.policies.name_rules import NameRule
from rpqfx.routing.router import Router
from rpqfx.validation.spelling import spelled
from rpqfx.validation.values import closest, flag, number, one_of, shown, whole

Number = int | float | None

LIGHT_WINDOW = 128
_MOST = 2**31 - 1


@spelled
@dataclass(frozen=True)
class RouteRule(NameRule):
    """Says what differs for some blocks.

    Args:
        match: A pattern (as of file names) for the qualified names of blocks, as ``routed`` lists them.
        skip: Why these are not routed, or None where they are.
        tokens: How many heavy tokens these have, in place of the policy's number.

    Raises:
        PolicyError: If it has both or neither, or the number makes no sense.
    """

    goes_with: ClassVar[str] = "RoutePolicy"

    tokens: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("tokens", self.tokens)


@spelled
@dataclass(frozen=True)
class RoutePolicy(PolicyBase):
    """Which blocks are routed, and how many tokens of each sequence take the heavy branch.

    Of rules that match a block the first is followed; else the policy's own values hold.

    Args:
        feed_forward: Heavy tokens of feed-forward blocks: an int counts them, a float is a share of each sequence.
            None leaves these blocks as they are.
        attention: Heavy tokens of attention; these attend to each other. None leaves it as it is.
        light: Width of the light branches over that of tokens; 0 for none.
        light_init: How the light branches of feed-forward blocks begin. ``"zero"``: their last layers are zero, and
            they are added to the heavy branches. ``"fit"``: they are the affine maps of low rank that come nearest to
            the blocks' own outputs on calibration data, which [`route`][rpqfx.route] is then given, and stand in for
            the heavy branches: a chosen token has what the block makes of it, any other what the light branch does.
            Routers are fitted then too, to choose the tokens on which light branches err most.
        light_window: Tokens in sight of the light branch of attention, even; 128 if left out.
        window: For causal models: tokens are chosen window by window, each by what was chosen of the one before, so
            that nothing depends on what comes later; the first window is heavy whole, and numbers of heavy tokens
            are those of each window.
        look_ahead: Whether a causal model may be routed without a window, so that which tokens are heavy depends on
            later ones. Not together with a window.
        router: Arguments of [`Router`][rpqfx.routing.Router], as JSON can hold them.
        rules: What differs for some blocks.

    Raises:
        PolicyError: If an option does not exist, is out of range, or would do nothing beside the others.
    """

    goes_with: ClassVar[str] = "route"
    rule: ClassVar[type] = RouteRule

    feed_forward: int | float | None = 0.25
    attention: int | float | None = 0.25
    light: float = 0.5
    light_init: Literal["zero", "fit"] = "zero"
    light_window: int | None = None
    window: int | None = None
    look_ahead: bool = False
    router: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rules: tuple[RouteRule, ...] = ()

    def __post_init__(self) -> None:
        _check_number("feed_forward", self.feed_forward)
        _check_number("attention", self.attention)
        if self.feed_forward is None and self.attention is None:
            raise PolicyError("feed_forward and attention are both None: nothing would be routed")
        number("light", self.light, "a width over that of tokens, 0 to 8", lambda value: 0 <= value <= 8)
        one_of("light_init", self.light_init, ("zero", "fit"))
        if self.window is not None:
            whole("window", self.window, 1, _MOST, what="of tokens, or None,")
        flag("look_ahead", self.look_ahead)
        self._check_rules()
        object.__setattr__(self, "router", _router(self.router))
        self._check_light_window()
        self._check_light_init()
        if self.window is not None and self.look_ahead:
            raise PolicyError("look_ahead=True would do nothing with a window, which looks at the past alone; give one")
        if self.window is not None and self.router.get("method", "exact") != "exact":
            raise PolicyError("a window is routed by the exact router's offset; leave out its method")

    def defaults(self) -> dict[str, Any]:
        """Returns the values that fields have where they are left out."""
        return {**super().defaults(), "light_window": LIGHT_WINDOW}

    def _check_light_window(self) -> None:
        if self.light_window is None:
            object.__setattr__(self, "light_window", LIGHT_WINDOW)
            return
        if type(self.light_window) is not int or not 2 <= self.light_window <= _MOST or self.light_window % 2:
            raise PolicyError(f"light_window is an even number of tokens, at least 2, got {shown(self.light_window)}")
        if self.light_window == LIGHT_WINDOW:
            return
        if not self.light:
            raise PolicyError(f"light_window={self.light_window} would do nothing: light=0 leaves out light branches")
        if self.attention is None and all(rule.tokens is None for rule in self.rules):
            raise PolicyError(f"light_window={self.light_window} would do nothing: attention=None leaves it unrouted")

    def _check_light_init(self) -> None:
        if self.light_init == "zero":
            return
        if not self.light:
            raise PolicyError("light_init='fit' would do nothing: light=0 leaves out light branches; leave out one")
        if self.feed_forward is None and all(rule.tokens is None for rule in self.rules):
            raise PolicyError(
                "light_init='fit' would do nothing: feed_forward=None leaves unrouted the blocks whose light branches "
                "are fitted"
            )

    def of(self, name: str, kind: str) -> int | float | str:
        """What holds for a block.

        Args:
            name: Its qualified name.
            kind: ``"feed_forward"`` or ``"attention"``.

        Returns:
            The number of heavy tokens, or why the block is not routed.
        """
        own, rule = getattr(self, kind), self.rule_for(name)
        if rule is not None:
            own = rule.tokens if rule.skip is None else rule.skip
        return f"{kind} is None" if own is None else own


def _router(options: Any) -> dict[str, Any]:
    """Arguments of a router, which are those that there are, and hold."""
    if not isinstance(options, Mapping):
        raise PolicyError(f"router is a mapping of arguments of Router, got {shown(options)}")
    made = {"dim", "learned", "device", "dtype"}  # what route says itself
    parameters = inspect.signature(Router.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in {"self", *made}}
    known = list(defaults)
    wrong = next((name for name in options if name not in known), None)
    if wrong is not None:
        raise PolicyError(f"router has no option {shown(wrong)}; it has {', '.join(known)}{closest(wrong, known)}")
    for name, default in (item for item in defaults.items() if item[0] in options):
        said = f"{name} of the router"
        if isinstance(default, bool):
            flag(said, options[name])
        elif isinstance(default, float):
            number(said, options[name], "a number above 0", lambda value: 0 < value < float("inf"))
        elif isinstance(default, int) or (name == "block_size" and options[name] is not None):
            whole(said, options[name], 1, _MOST)
    try:
        held: dict[str, Any] = json.loads(json.dumps(dict(options), allow_nan=False))
        Router(1, device="meta", **held)  # draws no numbers
    except (TypeError, ValueError, RecursionError, SpecError) as error:
        raise PolicyError(f"router cannot be made of {shown(dict(options))}: {error}") from error
    if "cosine_scale" in held and not held.get("cosine"):
        raise PolicyError("cosine_scale of the router would do nothing without cosine=True; leave it out")
    return held


def _check_number(name: str, value: Number) -> None:
    if value is None:
        return
    counts = type(value) is int and 1 <= value <= _MOST
    share = isinstance(value, float) and 0 < value <= 1
    if not counts and not share:
        raise PolicyError(
            f"{name} is a number of tokens (an int of at least 1) or a share of them (a float above 0, at most 1), "
            f"got {shown(value)}"
        )
