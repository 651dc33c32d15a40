"""The section of a model card that says how the model is held, how large it is, and how it is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from rpqfx.graph.sites import is_rewritten
from rpqfx.kv.module import attentions
from rpqfx.reporting.report import report
from rpqfx.reporting.tables import size
from rpqfx.routing.rewrite.rewrite import routed
from rpqfx.storage.files import draft

_BEGIN, _END = "<!-- rpqfx: written by save_pretrained -->", "<!-- rpqfx: end -->"


def write_card(folder: Path, model: Any) -> None:
    """Writes the section into ``README.md``: over the one that is there, or at the end of what is there.

    Args:
        folder: Of the model.
        model: What is saved there, of transformers.

    Raises:
        OSError: If the file cannot be read or written.
    """
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8") if path.exists() else "---\nlibrary_name: transformers\n---\n"
    section = f"{_BEGIN}\n{_section(folder, model)}{_END}\n"
    own = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
    if own.search(before):
        after = own.sub(lambda _: section, before, count=1)
    else:
        after = f"{before.rstrip()}\n\n{section}" if before.strip() else section
    with draft(path) as part:
        part.write_text(after, encoding="utf-8")


def _section(folder: Path, model: nn.Module) -> str:
    kind = getattr(type(model), "_rpq_base", type(model)).__name__
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lines = ["## Quantization: rpq", "", *_held(model), "", f"The weight files take {size(files)}."]
    lines += [
        "",
        "Loading needs the library `rpqfx`, which has to be imported; without it, transformers refuses the weights.",
        "",
        "```python",
        "import rpqfx",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("PATH OR NAME OF THIS FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _held(model: nn.Module) -> list[str]:
    lines = []
    if is_rewritten(model):
        made = report(model)
        ways = sorted({site.init for site in made.rewritten if site.init is not None})
        said = {
            "calibrated": "fitted to what calibration data showed of their inputs",
            "fit": "fitted to the weights alone, without data",
            "random": "drawn anew and trained",
        }
        lines += [
            f"{len(made.rewritten)} of {len(made.sites)} weights are quantized "
            "(product and residual quantization), "
            f"{made.bits_per_weight:.2f} bits a weight as saved, codes, codebooks and factors together; "
            f"{made.weights:,} weights in all.",
        ]
        if ways:
            lines += ["", "Codebooks and codes are " + ", or ".join(said.get(way, way) for way in ways) + "."]
    if cores := attentions(model):
        policy = next(iter(cores.values())).policy
        lines += [
            "",
            f"Older keys and values of {len(cores)} attention modules are held as codes of {policy.bits_per_value} "
            "bits.",
        ]
    if blocks := routed(model):
        lines += ["", f"{len(blocks)} blocks are conditionally routed."]
    return lines
