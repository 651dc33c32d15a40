"""Makes the tables of the documentation from the figures in ``examples/results``.

    python examples/bench/pages.py           # rewrites the tables in place
    python examples/bench/pages.py --check   # fails where a page does not show what the files say

A table stands between ``<!-- results: NAME -->`` and ``<!-- end of results -->``; ``TABLES`` says how it is made.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layer_tables
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
    return "\n".join([results.where(found), "", head, "|---" * 9 + "|", *lines]) + "\n"


def scratch(name: str) -> str:
    """Returns the losses of models that were trained from scratch at equal bytes, row by row."""
    found = results.read(name)
    lines = []
    for row in dict.fromkeys(run["row"] for run in found["runs"]):
        of_row = [run for run in found["runs"] if run["row"] == row]
        best = min((run for run in of_row if run["seed"] == 0), key=lambda run: run["choose"])["rate"]
        lines.append(_scratch_row(row, [run for run in of_row if run["rate"] == best]))
        converted = [{**run, **run["dense, converted"]} for run in of_row if "dense, converted" in run]
        if converted:
            lines.append(_scratch_row("dense, converted afterwards", [r for r in converted if r["rate"] == best]))
    sizes = found["sizes"]
    said = (
        f"`{found['command']}`: {sizes['layers']} layers, full width {sizes['width']}, {sizes['steps']} steps of "
        f"{sizes['batch']} x {sizes['length']} bytes."
    )
    head = "| row | width | bytes | test loss | seeds | learning rate |"
    return "\n".join([said, "", head, "|---" * 6 + "|", *lines]) + "\n"


def _scratch_row(name: str, runs: list[dict[str, Any]]) -> str:
    losses = [run["test"] for run in runs]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    first = runs[0]
    width = first["size"]
    return (
        f"| {name} | {width} | {first['bytes']:,} | {statistics.fmean(losses):.4f}{spread} | {len(losses)} | "
        f"{first['rate']:g} |"
    )


def gpu_layers() -> str:
    """Returns products on a GPU by rows: microseconds in a graph of CUDA, and as called from Python."""
    found = results.read(GPU)
    lines = [
        f"| {row['layer']} | {row['dtype']} | {row['rows']} | "
        + " | ".join(f"{row[way]['graph_us']:.1f}" for way in ("dense", "lookup", "dequantize", "auto"))
        + f" | {row['dense']['graph_us'] / row['auto']['graph_us']:.2f} | {row['dense']['eager_us']:.0f} | "
        f"{row['auto']['eager_us']:.0f} | {row['auto']['error']:.0e} |"
        for row in found["layers"]["rows"]
    ]
    head = (
        "| layer | dtype | rows | dense | lookup | dequantize | auto | dense over auto | dense as called | "
        "auto as called | error |"
    )
    return "\n".join([_on_gpu(found), "", head, "|---" * 11 + "|", *lines]) + "\n"


def gpu_models() -> str:
    """Returns what else was timed on a GPU: models, searches, routing, training."""
    found = results.read(GPU)
    lines = []
    for row in found["decoding"]["rows"]:
        name = f"1B shapes, bfloat16, {row['model']}, {row['tensor_bytes'] / 1e6:.0f} MB"
        lines += [f"| {name}: a token, {way} | {1e3 * row[f'{way}_s']:.2f} ms |" for way in ("eager", "compiled")]
        lines.append(f"| {name}: a prompt of 512 | {1e3 * row['prompt_s']:.2f} ms |")
    for row in found["search"]["rows"]:
        name = f"search of {row['points']} points, {row['stages']} stages of {row['entries']} entries, d = {row['d']}"
        lines += [f"| {name}: {way} | {row[way]['eager_us'] / 1e3:.2f} ms |" for way in ("kernel", "operators")]
    for row in found["routing"]["rows"]:
        what, name = next(iter(row.items()))
        lines.append(f"| {what}: {name} | {row['eager_us'] / 1e3:.2f} ms |")
    for row in found["training"]["rows"]:
        name = f"{row['layer']}, {row['rows']} rows, forwards and backwards"
        lines += [
            f"| {name}: {who} | {row[who]['eager_us'] / 1e3:.2f} ms, {row[who]['peak_bytes'] / 1e6:.0f} MB at most |"
            for who in ("dense", "ours")
        ]
    return "\n".join([_on_gpu(found), "", "| | |", "|---|---|", *lines]) + "\n"


def opening() -> str:
    """Returns what it takes to open a folder, dense and quantized, and what the folder takes."""
    found = results.read("pretrained")
    lines = [
        f"| {name} | {bytes_ / 1e6:.1f} | {row['seconds']:.2f} | {row['thread_seconds']:.2f} | "
        f"{row['seconds_to_first_answer']:.2f} | {row['tensors'] / 1e6:.1f} | {row['above'] / 1e6:.2f} |"
        for name, bytes_, row in (
            ("dense", found["dense_bytes"], found["dense"]),
            (f"quantized, {found['bits_per_weight']:.2f} bits a weight", found["folder_bytes"], found["small"]),
        )
    ]
    said = found["machine"]
    head = (
        "| | files, MB | seconds to open | of one thread | and to the first answer | tensors, MB | "
        "allocated above the finished model, MB |"
    )
    where = (
        f"{said['processor']} ({said['capability']}), {said['threads']} thread(s), torch {said['versions']['torch']}"
    )
    what = f"{found['model']}, transformers {said['versions']['transformers']}, on {where}"
    size = f"The files take {100 * found['folder_above_report']:.1f} % more than the report counts."
    return "\n".join([f"{what}: `{found['command']}`. {size}", "", head, "|---" * 7 + "|", *lines]) + "\n"


def distributed() -> str:
    """Returns the loss, the traffic and the memory of training in several processes, dense and quantized."""
    found = results.read("distributed")
    dense = {row["how"]: row for row in found["rows"] if row["kind"] == "dense"}
    lines = [
        f"| {row['kind']}, {row['how']} | {row['loss']:.4f} | {_megabytes(row['sent_bytes'])} | "
        f"{_times(dense[row['how']]['sent_bytes'], row['sent_bytes'])} | {_megabytes(row['held_bytes'])} | "
        f"{_times(dense[row['how']]['held_bytes'], row['held_bytes'])} |"
        for row in found["rows"]
    ]
    lines += [
        f"| a block of OPT-6.7B, {row['kind']}, DDP (counted, not run) | | {_megabytes(row['sent_bytes'])} | "
        f"{_times(found['block'][0]['sent_bytes'], row['sent_bytes'])} | | |"
        for row in found["block"]
    ]
    said = found["machine"]
    head = "| | loss | sent by a process for each step, MB | dense over it | held by a process, MB | dense over it |"
    where = f"{found['ranks']} processes on {said['processor']}, torch {said['versions']['torch']}"
    return "\n".join([f"Measured in {where}: `{found['command']}`.", "", head, "|---" * 6 + "|", *lines]) + "\n"


def ranks() -> str:
    """Returns memory and traffic of large models on many devices, counted, dense and quantized."""
    found = results.read("ranks")
    lines = [
        f"| {row['model']} | {row['ranks']} | {row['kind']} | "
        + " | ".join(f"{row[way]['held_bytes'] / 1e9:.1f} | {row[way]['sent_bytes'] / 1e9:.1f}" for way in WAYS)
        + " |"
        for row in found["rows"]
    ]
    head = "| model | devices | | " + " | ".join(f"{way}: held, GB | sent, GB" for way in WAYS) + " |"
    said = (
        f"Counted, not run: `{found['command']}`; {found['tokens']} tokens a step for each device, groups of "
        f"{found['tensor_parallel']} under tensor parallelism."
    )
    return "\n".join([said, "", head, "|---" * 9 + "|", *lines]) + "\n"


def kv_decode() -> str:
    """Returns what a token costs on codes: attention of one layer, and a whole model where it was timed."""
    found = results.read("kv-decode")
    parts = [results.where(found)]
    for name, key in (
        (f"attention of one token to {found['tokens']:,}, a layer", "layers"),
        (f"SmolLM2-135M at 3 bits, a token at {found.get('context', 0):,}, eager", "model"),
    ):
        if key not in found:
            continue
        rows = found[key]
        parts += ["", f"| {name} | ms | times as fast as {rows[0]['cache']} | MB |", "|---|---|---|---|"]
        parts += [
            f"| {row['cache']} | {row['ms']:.2f} | {rows[0]['ms'] / row['ms']:.2f} | {row['megabytes']:.2f} |"
            for row in rows
        ]
    return "\n".join(parts) + "\n"


def encoders() -> str:
    """Returns the times of converted encoders and convolutional networks, beside the dense ones."""
    found = results.read("encoders")
    lines = [
        f"| {row['model']} | {row['batch']} | {1e3 * row['dense_s']:.1f} | {1e3 * row['ours_s']:.1f} | "
        f"{row['dense_s'] / row['ours_s']:.2f} | {1e3 * row['dense_compiled_s']:.1f} | "
        f"{1e3 * row['ours_compiled_s']:.1f} | {row['dense_compiled_s'] / row['ours_compiled_s']:.2f} |"
        for row in found["rows"]
    ]
    head = "| | batch | dense, ms | ours | dense over ours | dense, compiled, ms | ours | dense over ours |"
    return "\n".join([results.where(found), "", head, "|---" * 8 + "|", *lines]) + "\n"


def kv_zoo() -> str:
    """Returns which architectures of transformers have their caches in codes, and what was checked of each."""
    found = results.read("kv-zoo")
    rows = {state: [row for row in found["rows"] if row["state"] == state] for state in _STATES}
    served, tried = len(rows["served"]), sum(len(rows[state]) for state in ("served", "refused", "failed"))
    head = [
        f"transformers {found['machine']['versions']['transformers']}, torch {found['machine']['versions']['torch']}: "
        f"`{found['command']}`.", "",
        f"Of {tried} architectures {served} are served ({100 * served / tried:.1f} %), {len(rows['refused'])} are "
        f"refused before calibration and {len(rows['failed'])} fail. {len(rows['none'])} more keep no keys, so that "
        f"there is nothing to serve, and of {len(rows['unknown'])} more there is no tiny model that runs.", "",
    ]  # fmt: skip
    most = max((row["checks"] for row in rows["served"]), key=len)
    checks = list(most)
    lines = [f"| architecture | {' | '.join(checks)} |", "|---" * (len(checks) + 1) + "|"]
    for row in (*rows["served"], *rows["failed"]):
        lines.append(f"| {row['id']} | {' | '.join(_checked(row['checks'].get(name)) for name in checks)} |")
    more = [(state, title) for state, title in _STATES.items() if title and rows[state]]
    for state, title in more:
        lines += ["", f"| {title} | why |", "|---|---|"]
        lines += [f"| {row['id']} | {_in_a_cell(row['detail'])} |" for row in rows[state]]
    return "\n".join([*head, *lines]) + "\n"


_STATES = {"served": "", "refused": "refused", "failed": "", "none": "keeps no keys", "unknown": "not tried"}


def _checked(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "?"
    if outcome["state"] == "n/a":
        return "-"
    if outcome["state"] == "failed":
        return "**no**"
    return f"{outcome['error']:.0e}" if "error" in outcome else "yes"


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:220]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}" if count else "-"


def _times(dense: int, count: int) -> str:
    return f"{dense / count:.1f}" if count else "-"


def _on_gpu(found: Any) -> str:
    moved = found["ceilings"]["rows"][0]
    return (
        f"Measured on {found['machine']['device']}, torch {found['machine']['versions']['torch']} "
        f"(copies {moved['copied_gb_s'] / 1e3:.1f} TB/s, multiplies {moved['bfloat16_tflops']:.0f} TFLOP/s in "
        f"bfloat16): `{found['command']}`."
    )


GPU = "gpu-nvidia-h200"
WAYS = ("DDP", "FSDP2", "TP")
TABLES: dict[str, Callable[[], str]] = {
    "quickstart": layer_tables.quickstart,
    "sizes": layer_tables.sizes,
    "layers": lambda: layer_tables.layers(short=False),
    "layers-short": lambda: layer_tables.layers(short=True),
    "reliability": reliability,
    "decode-smollm2": lambda: decoding("decode-smollm2"),
    "scratch-text": lambda: scratch("scratch-text"),
    "distributed": distributed,
    "ranks": ranks,
    "pretrained": opening,
    "kv-zoo": kv_zoo,
    "kv-decode": kv_decode,
    "encoders": encoders,
    "gpu-layers": gpu_layers,
    "gpu-models": gpu_models,
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
