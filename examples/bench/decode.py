"""Tokens a second of converted language models, beside the dense ones, other quantisers and llama.cpp, in one run.

    RPQFX_EVALKIT=<kit> python examples/bench/decode.py SmolLM2 --files <folder>     # converts what the folder lacks
    python examples/bench/decode.py Llama-1B --files <folder>                        # random weights, no kit

Every row is measured in a process of its own, two threads, one row after the other: 40 single tokens after 64 (the
median; eager, compiled, and as a package of AOTInductor), a prompt of 512 tokens (logits of the last one), bytes of the
file, what the process grew by once a small model had run in it, and the perplexity of the kit's first 8,192 tokens.
Writes ``examples/results/decode-<model>.json``. Peers run where their package is installed: ``torchao``, and for
llama.cpp ``cyllama`` with ``gguf``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decode_llama
import decode_steps
import results
import torch
from torch import nn

import rpqfx
from rpqfx.graph import capture, find_sites

BITS = (4.0, 3.0, 2.1)
SHAPE_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32_000, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- models


def dense(model: str) -> nn.Module:
    """Returns the dense model, float32, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if model == "SmolLM2":
        from convert_models import kit

        return kit().load_smollm2()[0].eval()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE_1B)).eval()


def converted(model: str, bits: float, folder: Path) -> Path:
    """Returns the file of a converted model, converted now if it is not there."""
    path = folder / f"{model}-{bits}.rpq"
    if path.exists():
        return path
    if model == "SmolLM2":
        from convert_models import load_smollm2

        loaded = load_smollm2()
        small = rpqfx.convert(loaded.model, rpqfx.Policy.pretrained(bits), loaded.calibration(16))
    else:
        small = with_random_codes(dense(model), rpqfx.Policy.pretrained(bits))
    rpqfx.save(small, path)
    return path


def small() -> nn.Module:
    """Returns a model of one block, with random codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return with_random_codes(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024)).eval(), rpqfx.Policy.pretrained(4))


def with_random_codes(model: nn.Module, policy: rpqfx.Policy) -> nn.Module:
    """Returns a model in the shapes that a policy gives it, with random codes: its speed does not depend on them."""
    decisions = policy.decide(find_sites(capture(model)))

    def drawn(site: rpqfx.Site) -> rpqfx.Quantize | rpqfx.KeepDense:
        decided = decisions[site.name]
        return dataclasses.replace(decided, init="random") if isinstance(decided, rpqfx.Quantize) else decided

    return rpqfx.rpqify(model, drawn)


def load(model: str, path: Path) -> nn.Module:
    """Returns the converted model of a file; the dense one is never made."""
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    if model == "SmolLM2":
        from convert_models import kit

        config = AutoConfig.from_pretrained(kit().MODELS / "smollm2" / "hf")
    else:
        config = LlamaConfig(**SHAPE_1B)
    return rpqfx.load(path, lambda: LlamaForCausalLM(config)).eval()


# ----------------------------------------------------------------------------------------------------- rows


def perplexity(model: nn.Module) -> float | None:
    """Returns the perplexity of the kit's fast text, or None without the kit."""
    if "RPQFX_EVALKIT" not in os.environ:
        return None
    from convert_models import kit

    return float(kit().eval_ppl(model, kit().load_smollm2()[1], max_tokens=8192))


def resident() -> int:
    """Returns the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def torch_row(model: str, build: Callable[[], nn.Module], file: Path | None, package: bool = True) -> dict[str, Any]:
    """Measures a model that runs on torch."""
    with torch.inference_mode():
        decode_steps.eager(small())  # whatever a first model brings into memory
    gc.collect()
    before = resident()
    made = build()
    with torch.inference_mode():
        row: dict[str, Any] = {"eager_s": decode_steps.eager(made)}
        row["grown_bytes"] = resident() - before
        row["tensor_bytes"] = sum({t.data_ptr(): t.nbytes for t in (*made.parameters(), *made.buffers())}.values())
        row["prompt_s"] = decode_steps.prompt(made)
        row["compiled_s"] = decode_steps.compiled(made)
    if package:
        with torch.no_grad():
            row["packaged_s"], row["packaged_error"] = decode_steps.packaged(made)
    row["perplexity"] = perplexity(made) if model == "SmolLM2" else None
    row["file_bytes"] = file.stat().st_size if file else row["tensor_bytes"]
    return row


def ours(model: str, bits: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{model}-{float(bits)}.rpq"
    return torch_row(model, lambda: load(model, path), path)


def plain(model: str, dtype: str, folder: Path) -> dict[str, Any]:
    return torch_row(model, lambda: dense(model).to(getattr(torch, dtype)), None)


def torchao(model: str, kind: str, folder: Path) -> dict[str, Any]:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    def build() -> nn.Module:
        made = dense(model)
        quantize_(made, Int8WeightOnlyConfig() if kind == "int8" else Int4WeightOnlyConfig(group_size=32))
        return made

    return torch_row(model, build, None, package=False)


def llama_cpp(model: str, kind: str, folder: Path) -> dict[str, Any]:
    """Measures a GGUF file of the same weights, of one type."""
    path = folder / f"{model}-{kind}.gguf"
    if model == "SmolLM2":
        from convert_models import kit

        source = next((kit().MODELS / "smollm2").glob("*Q4_1.gguf"))
    else:
        source = folder / f"{model}-F16.gguf"
        if not source.exists():
            decode_llama.write_gguf(dense(model), source)
    decode_llama.quantized(source, kind, path)
    row = decode_llama.speed(path, decode_steps.tokens()[0].tolist(), decode_steps.BEFORE, decode_steps.STEPS)
    if model == "SmolLM2":
        from transformers import AutoModelForCausalLM

        same = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()
        row["perplexity"] = perplexity(same)
    return row


KINDS: dict[str, Callable[[str, str, Path], dict[str, Any]]] = {
    "dense": plain, "rpqfx": ours, "torchao": torchao, "llama.cpp": llama_cpp,
}  # fmt: skip


def rows_of(model: str, bits: Sequence[float]) -> list[tuple[str, str]]:
    """Returns the rows that this machine's packages allow."""
    rows = [("dense", "float32"), ("dense", "bfloat16"), *[("rpqfx", str(one)) for one in bits]]
    if importlib.util.find_spec("torchao"):
        rows += [("torchao", "int8"), ("torchao", "int4")]
    if importlib.util.find_spec("cyllama"):
        rows += [("llama.cpp", kind) for kind in decode_llama.TYPES]
    return rows


def _shown(arguments: Sequence[str]) -> list[str]:
    """Returns a command's arguments without the name of the folder."""
    return [
        "<folder>" if before == "--files" else one for before, one in zip(["", *arguments], arguments, strict=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=["SmolLM2", "Llama-1B"])
    parser.add_argument("--files", type=Path, required=True, help="folder for converted models")
    parser.add_argument("--row", nargs=2, help="measure one row and print it as JSON")
    parser.add_argument("--bits", nargs="*", type=float, default=BITS, help="of converted models")
    parser.add_argument("--only", nargs="*", help="kinds of rows")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.files.mkdir(parents=True, exist_ok=True)
    if args.row:
        print(json.dumps(KINDS[args.row[0]](args.model, args.row[1], args.files)))
        return
    for bits in args.bits:
        converted(args.model, bits, args.files)
    found = []
    for kind, which in rows_of(args.model, args.bits):
        if args.only and kind not in args.only and which not in args.only:
            continue
        command = [sys.executable, __file__, args.model, "--files", str(args.files), "--row", kind, which]
        run = subprocess.run(command, capture_output=True, text=True)
        last = run.stdout.strip().splitlines()[-1:] or [""]
        row = json.loads(last[0]) if run.returncode == 0 else {"failed": run.stderr.strip().splitlines()[-1][:200]}
        found.append({"kind": kind, "which": which, **row})
        print(json.dumps(found[-1]), flush=True)
        results.write(  # what there is so far, for a run that is cut short
            f"decode-{args.model.lower()}", " ".join(["python examples/bench/decode.py", *_shown(sys.argv[1:])]),
            {"model": args.model, "rows": found},
        )  # fmt: skip


if __name__ == "__main__":
    main()
