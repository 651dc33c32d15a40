"""A table as text, as Markdown and as a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2rem;color:#222}table{border-collapse:collapse}"
    "th,td{padding:.2rem .6rem;text-align:left;white-space:nowrap;border-bottom:1px solid #eee}"
    "tbody th{font-weight:400;font-family:ui-monospace,monospace}.bars{width:16rem;min-width:16rem}"
    ".bar{height:.45rem;margin:1px 0;min-width:1px}.dense{background:#c7ccd4}.held{background:#2b6cb0}"
    ".left{background:#a0a7b3}"
)


class Table(NamedTuple):
    """Rows and totals of a table.

    Args:
        head: Column titles.
        rows: One a site, the name first.
        totals: Lines below.
    """

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    totals: list[str]


def to_text(table: Table) -> str:
    """Returns columns for a terminal."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([lines[0], rule, *lines[1:], rule, *table.totals])


def to_markdown(table: Table) -> str:
    """Returns a Markdown table, totals below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [line(table.head), line(["---"] * len(table.head)), *map(line, table.rows)]
    return "\n".join([*rows, "", *(f"- {text}" for text in table.totals)])


def to_html(table: Table, bars: Sequence[tuple[int, int, bool]], below: str = "") -> str:
    """Returns a page that needs nothing else.

    Args:
        table: Rows and totals.
        bars: For each row, two lengths that are drawn on one scale, and whether the second stands for codebooks.
        below: HTML behind the table.
    """
    most = max((max(before, after) for before, after, _ in bars), default=1) or 1
    rows = []
    for cells, (before, after, held) in zip(table.rows, bars, strict=True):
        name, *rest = (html.escape(cell) for cell in cells)
        both = (("dense", before), ("held" if held else "left", after))
        drawn = "".join(f'<div class="bar {kind}" style="width:{100 * n / most:.3f}%"></div>' for kind, n in both)
        rows.append(f"<tr><th>{name}</th><td class=bars>{drawn}</td>{''.join(f'<td>{c}</td>' for c in rest)}</tr>")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in (table.head[0], "dense / now", *table.head[1:]))
    totals = "".join(f"<li>{html.escape(text)}</li>" for text in table.totals)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>rpqfx report</title><style>{_STYLE}</style>"
        f"<h1>rpqfx report</h1><ul>{totals}</ul><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{below}</html>\n"
    )


def size(count: int) -> str:
    """Returns the bytes in decimal units, as file sizes are given."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count} B"
