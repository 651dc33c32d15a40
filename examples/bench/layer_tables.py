"""Tables of layers, of models' sizes and of the quickstart, which ``pages.py`` puts into the documentation."""

from __future__ import annotations

from typing import Any

import results


def layers(short: bool) -> str:
    """Returns milliseconds of linear layers beside what they are compared with.

    Args:
        short: Whether a reader is to see what there is at a glance, or every figure.
    """
    found = results.read("layers")
    rows = [row for row in found["rows"] if not short or row["batch"] in (1, 512)]
    gather = rows[0]["gather"]
    if short:
        head = f"| layer (in x out, codebooks), rows | pass | dense | {gather} | rpqfx | dense over rpqfx |"
        lines = [_layer(row, ("dense_ms", "gather_ms", "ours_ms")) + f" | {_over(row):.1f} x |" for row in rows]
        return "\n".join([results.where(found), "", head, "|---" * 6 + "|", *lines]) + "\n"
    head = (
        f"| in x out, codebooks, rows | pass | dense | {gather} | torch's operators | rpqfx | again at once "
        "| dense over rpqfx | MB, 10^9 multiply-adds, 10^9 additions | floor | of the floor |"
    )
    ways = ("dense_ms", "gather_ms", "operators_ms", "ours_ms", "again_ms")
    lines = [
        f"{_layer(row, ways)} | {_over(row):.1f} x | {row['bytes'] / 1e6:.1f}, {row['products'] / 1e9:.2f}, "
        f"{row['additions'] / 1e9:.2f} | {row['floor_ms']:.2f} | {row['floor_ms'] / row['ours_ms']:.0%} |"
        for row in rows
    ]
    speeds, table = found["speeds"], found["embedding"]
    said = (
        f"{results.where(found)} Measured first: {speeds['bytes'] / 1e9:.0f} GB/s, {speeds['products'] / 1e9:.0f} G "
        f"multiply-adds a second, {speeds['additions'] / 1e9:.0f} G additions a second. Eight rows of a table of "
        f"50,272 x 9,216: dense {table['dense_ms']:.3f} ms, gathered {table['gather_ms']:.1f} ms, rpqfx "
        f"{table['ours_ms']:.3f} ms."
    )
    return "\n".join([said, "", head, "|---" * 11 + "|", *lines]) + "\n"


def sizes() -> str:
    """Returns bytes of two models, dense and with one codebook for each attention head."""
    found = results.read("sizes")
    lines = [
        f"| {row['model']}{'' if row['split'] == 'auto' else ', vectors as rows'} | {row['before'] / 2**20:,.1f} MiB | "
        f"{row['after'] / 2**20:,.1f} MiB | {row['theirs_mib']:,.1f} MiB |"
        for row in found["rows"]
    ]
    head = "| model | dense | rewritten | RPQ-pytorch reports |"
    said = f"Counted on the meta device: `{found['command']}`."
    return "\n".join([said, "", head, "|---" * 4 + "|", *lines]) + "\n"


def quickstart() -> str:
    """Returns what the quickstart shows, and how long it takes."""
    found = results.read("quickstart")
    lines = [
        f"| {row['model']} | {row['bytes']:,} | {row['loss']:.3f} | "
        f"{f'{speed:,.0f}' if (speed := row['tokens_a_second']) else '-'} |"
        for row in found["rows"]
    ]
    head = "| model | bytes | validation loss | tokens a second, training |"
    said = (
        f"{results.where(found)} {found['steps']} steps of {found['batch']} x {found['context']} bytes; "
        f"{found['seconds']:.0f} seconds in all."
    )
    return "\n".join([said, "", head, "|---" * 4 + "|", *lines]) + "\n"


def _layer(row: dict[str, Any], ways: tuple[str, ...]) -> str:
    times = " | ".join(f"{row[way]:.2f}" if way in row else "-" for way in ways)
    which = "forward + backward" if row["backward"] else "forward"
    return f"| {row['wide']} x {row['out']}, {row['count']}, {row['batch']} | {which} | {times}"


def _over(row: dict[str, Any]) -> float:
    return row["dense_ms"] / row["ours_ms"]  # type: ignore[no-any-return]
