"""How a model's blocks are routed: values that say it, and nothing that does it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rpqfx import byname
from rpqfx.errors import PolicyError

Number = int | float | None


@dataclass(frozen=True)
class RouteRule:
    """What differs for some blocks.

    Args:
        match: A pattern (as of file names) for the qualified names of blocks, as ``routed`` lists them.
        skip: Why these are not routed, or None where they are.
        tokens: How many heavy tokens these have, in place of the policy's number.

    Raises:
        PolicyError: If it has both or neither, or the number makes no sense.
    """

    match: str
    skip: str | None = None
    tokens: int | float | None = None

    def __post_init__(self) -> None:
        if (self.skip is None) == (self.tokens is None):
            raise PolicyError(f"a RouteRule either skips or sets tokens; that for {self.match!r} has both or neither")
        _check_number("tokens", self.tokens)

    def matches(self, name: str) -> bool:
        """Whether it holds for the block of this name."""
        return fnmatch.fnmatchcase(name, self.match)


@dataclass(frozen=True)
class RoutePolicy:
    """Which blocks are routed, and how many tokens of each sequence take the heavy branch.

    Of rules that match a block the first is followed; else the policy's own values hold.

    Args:
        feed_forward: Heavy tokens of feed-forward blocks: an int counts them, a float is a share of each sequence.
            None leaves these blocks as they are.
        attention: Heavy tokens of attention; these attend to each other. None leaves it as it is.
        light: Width of the light branches over that of tokens; 0 for none.
        light_window: Tokens in sight of the light branch of attention, even.
        window: For causal models: tokens are chosen window by window, each by what was chosen of the one before, so
            that nothing depends on what comes later; the first window is heavy whole, and numbers of heavy tokens
            are those of each window.
        look_ahead: Whether a causal model may be routed without a window, so that which tokens are heavy depends on
            later ones.
        router: Arguments of [`Router`][rpqfx.routing.Router].
        rules: What differs for some blocks.

    Raises:
        PolicyError: If a value is out of range.
    """

    feed_forward: int | float | None = 0.25
    attention: int | float | None = 0.25
    light: float = 0.5
    light_window: int = 128
    window: int | None = None
    look_ahead: bool = False
    router: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rules: tuple[RouteRule, ...] = ()

    def __post_init__(self) -> None:
        _check_number("feed_forward", self.feed_forward)
        _check_number("attention", self.attention)
        if self.feed_forward is None and self.attention is None:
            raise PolicyError("feed_forward and attention are both None: nothing would be routed")
        if not 0 <= self.light <= 8:
            raise PolicyError(f"light is a width over that of tokens, 0 to 8, got {self.light!r}")
        if not isinstance(self.light_window, int) or self.light_window < 2 or self.light_window % 2:
            raise PolicyError(f"light_window is an even number of tokens, at least 2, got {self.light_window!r}")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise PolicyError(f"window is a number of tokens, at least 1, or None, got {self.window!r}")
        if self.window is not None and self.router.get("method", "exact") != "exact":
            raise PolicyError("a window is routed by the exact router's offset; leave out its method")
        object.__setattr__(self, "router", dict(self.router))
        object.__setattr__(self, "rules", tuple(self.rules))

    def of(self, name: str, kind: str) -> int | float | str:
        """What holds for a block.

        Args:
            name: Its qualified name.
            kind: ``"feed_forward"`` or ``"attention"``.

        Returns:
            The number of heavy tokens, or why the block is not routed.
        """
        own: Number | str = getattr(self, kind)
        for rule in reversed(self.rules):
            if rule.matches(name):
                own = rule.tokens if rule.skip is None else rule.skip
        return f"{kind} is None" if own is None else own

    def to_json(self) -> str:
        """The policy as JSON; ``from_json`` reads it."""
        return byname.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> RoutePolicy:
        """The policy that ``to_json`` wrote.

        Raises:
            PolicyError: If the text says something else.
        """
        return byname.from_json(cls, RouteRule, text, cls.__name__)


def _check_number(name: str, number: Number) -> None:
    if number is None:
        return
    whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
    share = isinstance(number, float) and 0 < number <= 1
    if not whole and not share:
        raise PolicyError(
            f"{name} is a number of tokens (an int of at least 1) or a share of them (a float above 0, at most 1), "
            f"got {number!r}"
        )
