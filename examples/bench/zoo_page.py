"""The zoo's results as a Markdown page."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from zoo_coverage import share

Results = list[dict[str, Any]]
_COLUMNS = ("eval", "train", "names", "deepcopy", "pickle", "save_load", "compile", "steps")
_HEADS = ("eval", "train", "names", "copy", "pickle", "save", "compile", "steps")

_INTRODUCTION = """# The zoo

This page is made by `examples/bench/zoo.py`. Every model below, with random weights, is rewritten with
`Policy.from_scratch()` and held against its *twin*: the dense model whose rewritten weights are set to the tensors
that the codebooks stand for.

| column | what is checked |
|---|---|
| eval | outputs, and gradients of inputs, of untouched Parameters and of codebooks, equal the twin's |
| train | the same in train mode with the same seed; buffers, too |
| names | untouched tensors keep their names, values and order in the state dict |
| copy, pickle, save | `deepcopy`, `pickle`, and `rpqfx.save` with `rpqfx.load`, give a model with the same outputs |
| compile | `torch.compile(fullgraph=True)` in eval mode, outputs and gradients, wherever it takes the twin |
| steps | three steps of AdamW, the twin's weights expanded from codebooks of its own: losses agree to 1e-4 |

A column says `32` where float32 was enough (1e-3, relative to the largest element of an output, or to a gradient's
norm), and `64` where rounding in the model itself hid the comparison and it was repeated in float64 (1e-6); `-` where
the dense model cannot do it either. Parameters that are constant after initialisation (zero heads, layer scales) are
disturbed first, since they would hide what comes before them.

The share is that of the bytes of all weights that are quantized, or that the policy left because they are small or
would not shrink. Weights are the Parameters of two or more axes, without those that no product, convolution or lookup
uses, such as position embeddings that are only added.
"""


def page(results: Results, remarks: str | None = None) -> str:
    """All of it."""
    parts = [_INTRODUCTION, _versions(results), _totals(results), remarks or "", _table(results)]
    parts += [_not_applicable(results), _missed(results), _failures(results)]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def summary(results: Results, chosen: set[str]) -> list[str]:
    """Totals, and what failed of the chosen models, for a terminal."""
    return [line for line in _totals(results).splitlines() if line.startswith("|")] + [
        f"{r['id']}: {name}: {check['detail']}"
        for r in results
        for name, check in r["checks"].items()
        if check["state"] == "failed" and r["id"] in chosen
    ]


def passed(result: dict[str, Any]) -> bool:
    """Whether every check of a model has run, and none failed."""
    checks = result["checks"]
    return set(_COLUMNS) <= set(checks) and all(check["state"] != "failed" for check in checks.values())


def architectures(results: Results) -> set[str]:
    """Architectures by name; libraries write some of them differently."""
    return {re.sub(r"[-_ ]", "", r["architecture"]).lower() for r in results}


def _sums(results: Results) -> list[dict[str, Any]]:
    return [r["checks"]["coverage"]["sums"] for r in results if "sums" in r["checks"].get("coverage", {})]


def _versions(results: Results) -> str:
    found: dict[str, set[str]] = {}
    for result in results:
        for name, version in result.get("versions", {}).items():
            found.setdefault(name, set()).add(version)
    return "Versions: " + ", ".join(f"{name} {' and '.join(sorted(v))}" for name, v in sorted(found.items())) + "."


def _totals(results: Results) -> str:
    lines = [
        "## Totals",
        "",
        "| library | models | architectures | pass | share | quantized | left by the policy | no weight | missed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    libraries = list(dict.fromkeys(r["library"] for r in results))
    for name in [*libraries, "all"]:
        mine = [r for r in results if name in (r["library"], "all")]
        sums = _sums(mine)
        sizes = [_size(sum(s[kind]["bytes"] for s in sums)) for kind in ("rewritten", "policy", "no weight", "missed")]
        cells = [name, str(len(mine)), str(len(architectures(mine))), str(sum(map(passed, mine)))]
        lines.append("| " + " | ".join([*cells, f"{share(sums):.2%}", *sizes]) + " |")
    return "\n".join(lines) + "\n"


def _table(results: Results) -> str:
    lines = [
        "## Models",
        "",
        "| model | architecture | parameters | share | " + " | ".join(_HEADS) + " | seconds to rewrite |",
        "|---|---|---|---|" + "---|" * (len(_HEADS) + 1),
    ]
    for r in results:
        checks = [_cell(r["checks"].get(name)) for name in _COLUMNS]
        portion = f"{share(_sums([r])):.1%}" if _sums([r]) else "?"
        cells = [r["id"], r["architecture"], f"{r.get('parameters', 0):,}", portion, *checks]
        lines.append("| " + " | ".join([*cells, f"{r.get('rewrite_s', 0):.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def _cell(check: dict[str, Any] | None) -> str:
    if check is None:
        return "?"
    if check["state"] == "ok":
        return str(check.get("precision", "yes")).removeprefix("float")
    return "-" if check["state"] == "n/a" else "**no**"


def _not_applicable(results: Results) -> str:
    """Why dense models cannot do what is checked, counted."""
    reasons: Counter[tuple[str, str]] = Counter()
    for r in results:
        for name, check in r["checks"].items():
            if check["state"] == "n/a":
                reasons[name, check["detail"].split(": ")[0]] += 1
    lines = ["## What dense models cannot do", "", "| check | why | models |", "|---|---|---|"]
    lines += [f"| {name} | {why} | {count} |" for (name, why), count in reasons.most_common()]
    return "\n".join(lines) + "\n" if reasons else ""


def _missed(results: Results) -> str:
    lines = ["## Weights that were missed", "", "| model | tensor | shape | bytes | why |", "|---|---|---|---|---|"]
    for r in results:
        for tensor in r["checks"].get("coverage", {}).get("missed", ()):
            shape = " x ".join(map(str, tensor["shape"]))
            lines.append(f"| {r['id']} | {tensor['name']} | {shape} | {tensor['bytes']:,} | {tensor['reason']} |")
    return "\n".join(lines) + "\n" if len(lines) > 4 else "## Weights that were missed\n\nNone.\n"


def _failures(results: Results) -> str:
    lines = [
        f"- {r['id']}, {name}: {check['detail']}"
        for r in results
        for name, check in r["checks"].items()
        if check["state"] == "failed"
    ]
    return "\n".join(["## Checks that failed", "", *(lines or ["None."])]) + "\n"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
