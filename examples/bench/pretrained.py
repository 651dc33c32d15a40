"""What a folder of a quantized model takes, and what it takes to open it, beside the dense model's folder.

    RPQFX_EVALKIT=<kit> python examples/bench/pretrained.py --files <folder>       # SmolLM2 at 3 bits
    python examples/bench/pretrained.py --random                                   # a small random model, no kit

The folder of files may hold ``SmolLM2-3.0.rpq`` (``decode.py`` makes it); what it lacks is converted now. Each opening
runs in a process of its own, after a tiny model was opened there, dense and small by turns: seconds (the median), until
the model is there and until it has answered once (a dense model's tensors are pages of the file, read when used), on
the clock and of the thread that opens it, and the memory of the process: what was allocated at most above what the
finished model takes (``RssAnon``, read every millisecond), and the same with the pages of the file that were read
(``VmRSS``). Writes ``examples/results/pretrained.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import results
import torch
from decode import converted, dense, load

import rpqfx

SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


def models(files: Path | None) -> tuple[Any, Any]:
    """Returns the dense model and the small one."""
    if files is not None:
        return dense("SmolLM2"), load("SmolLM2", converted("SmolLM2", 3.0, files))
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return model, rpqfx.rpqify(model, rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=8)).eval()


def status() -> dict[str, int]:
    """Returns bytes of the process: allocated ones, and all that are resident."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmRSS")}


class Peak:
    """Reads memory every millisecond, in a thread."""

    def __init__(self) -> None:
        self.highest = status()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            now = status()
            self.highest = {name: max(value, now[name]) for name, value in self.highest.items()}

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()


def opened(folder: str, warm: str) -> dict[str, Any]:
    """Opens a folder in this process."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_pretrained(warm)
    gc.collect()
    before = status()
    with Peak() as peak:
        start, busy = time.perf_counter(), time.thread_time()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        seconds, busy = time.perf_counter() - start, time.thread_time() - busy
    gc.collect()
    after = status()
    seen = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    start = time.perf_counter()
    with torch.no_grad():
        checksum = float(model(torch.arange(3, 64)[None]).logits.double().abs().sum())
    answered = seconds + time.perf_counter() - start
    grown = {name: after[name] - before[name] for name in before}
    return {
        "seconds": seconds, "thread_seconds": busy, "seconds_to_first_answer": answered, "tensors": sum(seen.values()),
        "grown": grown["RssAnon"], "checksum": checksum,
        "above": peak.highest["RssAnon"] - after["RssAnon"], "above_with_pages": peak.highest["VmRSS"] - after["VmRSS"],
    }  # fmt: skip


def measured(folder: Path, warm: Path) -> dict[str, Any]:
    """Opens a folder in a process of its own."""
    command = [sys.executable, __file__, "--open", str(folder), str(warm)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    given = parser.parse_args()
    if given.open:
        print(json.dumps(opened(*given.open)))
        return
    if given.files is None and not given.random:
        parser.error("give --files or --random")
    with tempfile.TemporaryDirectory() as made:
        folders = {name: Path(made) / name for name in ("dense", "small", "warm")}
        whole, small = models(given.files)
        start = time.perf_counter()
        small.save_pretrained(folders["small"])
        saving = time.perf_counter() - start
        whole.save_pretrained(folders["dense"])
        rpqfx.rpqify(
            _tiny(), rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=4, min_size=1024)
        ).save_pretrained(folders["warm"])
        told = rpqfx.report(small)
        held = sum(entry.numel() for entry in small.state_dict().values() if entry.is_floating_point())
        with torch.no_grad():
            checksum = float(small(torch.arange(3, 64)[None]).logits.double().abs().sum())
        file = sum(path.stat().st_size for path in folders["small"].glob("*.safetensors"))
        stored = told.stored_bits // 8 + told.other
        figures: dict[str, Any] = {
            "model": "SmolLM2-135M at 3 bits" if given.files else "random", "saving_seconds": saving,
            "folder_bytes": file, "report_bytes": stored, "folder_above_report": file / stored - 1,
            "bits_per_weight": told.bits_per_weight, "floats": held,
            "dense_bytes": sum(path.stat().st_size for path in folders["dense"].glob("*.safetensors")),
        }  # fmt: skip
        del whole, small
        gc.collect()
        rounds = {name: [] for name in ("dense", "small")}
        for _ in range(given.rounds):
            for name, found in rounds.items():
                found.append(measured(folders[name], folders["warm"]))
    for name, found in rounds.items():
        figures[name] = {key: statistics.median(one[key] for one in found) for key in found[0] if key != "checksum"}
        figures[name]["above_finished"] = figures[name]["above"] / figures[name]["grown"]
    assert {one["checksum"] for one in rounds["small"]} == {checksum}
    options = "--random" if given.random else "--files <folder>"
    path = results.write("pretrained", f"python examples/bench/pretrained.py {options}", figures, given.results)
    print(path.read_text())


def _tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024))


if __name__ == "__main__":
    main()
