"""Converts an OPT from shards on disk while it is loaded, and states the memory that this takes, beside one block.

    python examples/bench/outgrown.py                                    # 8 blocks of width 512
    python examples/bench/outgrown.py --width 2048 --blocks 20           # 2 GB of shards
    python examples/bench/outgrown.py --width 9216 --blocks 64 --vocabulary 50272       # OPT-66B, 132 GB of shards

The dense model is never in memory: it is made on the meta device, and its random weights are written block by block, in
float16. A process of its own converts the folder without data, and reads its memory every millisecond: what is
allocated (``RssAnon``, without the pages of the shards, which the system drops when it needs room) at most, above what
it was with everything imported and a tiny model converted. ``--interrupt`` ends a first process when half of the
weights are done; a second one goes on. Writes ``examples/results/outgrown.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import results
import torch
from pretrained import Peak, status

import rpqfx


def config_of(width: int, blocks: int, vocabulary: int) -> Any:
    """Returns the config of an OPT."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=vocabulary, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
        num_hidden_layers=blocks, num_attention_heads=max(1, width // 64), max_position_embeddings=512, dtype="float16",
    )  # fmt: skip


def write_shards(folder: Path, config: Any) -> int:
    """Writes a folder of random weights with a shard for each block.

    Args:
        folder: Made if it is not there.
        config: Config of an OPT.

    Returns:
        The bytes of a block.
    """
    from safetensors.torch import save_file
    from transformers import OPTForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = OPTForCausalLM(config).half()
    shards: dict[str, list[str]] = {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name in shapes:
        block = name.partition(".layers.")[2].partition(".")[0]
        shards.setdefault(f"model-{int(block) + 1 if block else 0:05}.safetensors", []).append(name)
    generator, block_bytes = torch.Generator().manual_seed(0), 0
    for file, names in shards.items():
        tensors = {name: torch.randn(shapes[name], generator=generator).mul_(0.02).half() for name in names}
        block_bytes = max(block_bytes, sum(t.nbytes for t in tensors.values()) if ".layers." in names[0] else 0)
        save_file(tensors, folder / file, {"format": "pt"})
    where = {name: file for file, names in shards.items() for name in names}
    size = sum((folder / file).stat().st_size for file in shards)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(folder)
    return block_bytes


def convert(folder: str, bits: float, kept: str, stop_at: int) -> dict[str, Any]:
    """Converts a folder in this process; ends it when so many weights are kept, where that is asked."""
    import transformers

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as tiny:
        write_shards(Path(tiny), config_of(64, 1, 256))
        transformers.AutoModelForCausalLM.from_pretrained(tiny, quantization_config=rpqfx.RPQConfig(bits))
    gc.collect()
    before = status()
    if stop_at:
        threading.Thread(target=_end_at, args=(Path(kept), stop_at), daemon=True).start()
    with Peak() as peak:
        start = time.perf_counter()
        config = rpqfx.RPQConfig(bits, checkpoint=kept)
        small = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        seconds = time.perf_counter() - start
    told = rpqfx.report(small)
    return {
        "peak_bytes": peak.highest["RssAnon"] - before["RssAnon"], "model_bytes": told.after, "seconds": seconds,
        "peak_bytes_with_pages": peak.highest["VmRSS"] - before["VmRSS"], "bits_per_weight": told.bits_per_weight,
        "weights": len(told.rewritten), "checksum": float(sum(p.double().abs().sum() for p in small.parameters())),
    }  # fmt: skip


def _end_at(kept: Path, count: int) -> None:
    while len(list(kept.glob("*"))) < count:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def in_process(folder: Path, bits: float, kept: Path, stop_at: int = 0) -> dict[str, Any] | None:
    """Converts a folder in a process of its own.

    Args:
        folder: As ``write_shards`` made it.
        bits: Bits a weight.
        kept: Folder for weights that are done.
        stop_at: How many of them end the process; 0 lets it come to its end.

    Returns:
        The figures; None where the process was ended.
    """
    command = [sys.executable, __file__, "--convert", str(folder), str(bits), str(kept), str(stop_at)]
    done = subprocess.run(command, capture_output=True, text=True)
    if stop_at and done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(width: int, blocks: int, vocabulary: int, bits: float, interrupt: bool) -> dict[str, Any]:
    """Returns the figures of one model."""
    with tempfile.TemporaryDirectory() as made:
        folder, kept = Path(made) / "dense", Path(made) / "kept"
        block = write_shards(folder, config_of(width, blocks, vocabulary))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if interrupt:
            in_process(folder, bits, kept, 3 * blocks)
        found = in_process(folder, bits, kept)
    assert found is not None
    above = found["peak_bytes"] - found["model_bytes"]
    return {
        "width": width, "blocks": blocks, "shard_bytes": size, "block_bytes": block, **found,
        "above_finished_in_blocks": above / block, "interrupted": interrupt,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--interrupt", action="store_true")
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    given = parser.parse_args()
    if given.convert:
        folder, bits, kept, stop_at = given.convert
        print(json.dumps(convert(folder, float(bits), kept, int(stop_at))))
        return
    figures = measured(given.width, given.blocks, given.vocabulary, given.bits, given.interrupt)
    options = f" --width {given.width} --blocks {given.blocks}{' --interrupt' if given.interrupt else ''}"
    print(results.write("outgrown", f"python examples/bench/outgrown.py{options}", figures, given.results).read_text())


if __name__ == "__main__":
    main()
