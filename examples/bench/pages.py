"""Makes the tables of the documentation from the figures in ``examples/results``.

    python examples/bench/pages.py           # rewrites the tables in place
    python examples/bench/pages.py --check   # fails where a page does not show what the files say

A table stands between ``<!-- results: NAME -->`` and ``<!-- end of results -->``; ``TABLES`` says how it is made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import results

ROOT = Path(__file__).parents[2]
_TABLE = re.compile(r"(?P<head><!-- results: (?P<name>[\w-]+) -->\n).*?(?P<foot><!-- end of results -->)", re.DOTALL)


def reliability() -> str:
    """Returns what was attacked, how often, and what came of it."""
    rows = [
        f"| {found['attack']} | {found['tried']:,} | {found['outcome']} | `{found['command']}` |"
        for found in results.read_all("reliability")
    ]
    return "\n".join(["| attack | tries | outcome | command |", "|---|---|---|---|", *rows]) + "\n"


def decoding(name: str) -> str:
    """Returns tokens a second of one model, row by row, and how many times as many as dense float32 in eager mode."""
    found = results.read(name)
    rows = [row for row in found["rows"] if "failed" not in row]
    first = rows[0]["eager_s"]
    lines = []
    for row in rows:
        compiled, packaged = (f"{1 / row[way]:.1f}" if row.get(way) else "-" for way in ("compiled_s", "packaged_s"))
        times = min(row[way] for way in ("eager_s", "compiled_s", "packaged_s") if row.get(way))
        perplexity = f"{row['perplexity']:.2f}" if row.get("perplexity") else "-"
        grown = f"{row['grown_bytes'] / 1e6:.0f}" if row.get("grown_bytes") else "-"
        lines.append(
            f"| {row['kind']} {row['which']} | {row['file_bytes'] / 1e6:.1f} | {grown} | {perplexity} | "
            f"{1 / row['eager_s']:.1f} | {compiled} | {packaged} | {first / times:.2f} | {512 / row['prompt_s']:.0f} |"
        )
    head = (
        "| | MB | process grown by, MB | perplexity | tokens/s | compiled | packaged | best over dense eager | "
        "prompt, tokens/s |"
    )
    said = found["machine"]
    where = f"{said['processor']} ({said['capability']}), {said['threads']} threads, torch {said['versions']['torch']}"
    return "\n".join([f"Measured on {where}: `{found['command']}`.", "", head, "|---" * 9 + "|", *lines]) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "reliability": reliability,
    "decode-smollm2": lambda: decoding("decode-smollm2"),
}


def pages() -> list[Path]:
    """Returns the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """Returns a page with every table made anew.

    Raises:
        KeyError: If a page asks for a table that nobody makes.
    """
    return _TABLE.sub(lambda found: f"{found['head']}\n{TABLES[found['name']]()}\n{found['foot']}", text)


def main() -> int:
    """Rewrites the pages, or with ``--check`` compares them; returns the exit status."""
    stale = []
    for page in pages():
        text = page.read_text("utf-8")
        if (new := filled(text)) != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(new, "utf-8")
    for name in stale:
        print(f"{name}: {'differs from examples/results' if '--check' in sys.argv else 'rewritten'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
