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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx.graph import capture, find_sites

STEPS, BEFORE, PROMPT = 40, 64, 512
BITS = (4.0, 3.0, 2.1)
TYPES = {"F32": 0, "Q8_0": 7, "Q4_0": 2, "Q3_K_S": 11, "IQ3_S": 26, "Q2_K": 10}
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
        small = rpqfx.rpqify(loaded.model, rpqfx.Policy.pretrained(bits), calibration=loaded.calibration(16))
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

    def drawn(site: rpqfx.Site) -> rpqfx.Hold | rpqfx.Skip:
        decided = decisions[site.name]
        return dataclasses.replace(decided, init="random") if isinstance(decided, rpqfx.Hold) else decided

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


# --------------------------------------------------------------------------------------------------- timing


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention whose heads of queries stay beside the head of keys that they share, where there is one token.

    Transformers does the same with one token, but not in compiled code, where it copies keys and values for each head.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, tokens_, dim = query.shape
    if tokens_ > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = query.reshape(batch, key.shape[1], -1, dim)
    y = nn.functional.scaled_dot_product_attention(packed, key, value, attention_mask, scale=options["scaling"])
    return y.reshape(batch, 1, heads, dim), None


class Step(nn.Module):
    """One token of a model with a static cache, as a function of tensors alone."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("one token", attention)
        AttentionMaskInterface.register("one token", sdpa_mask)
        model.set_attn_implementation("one token")
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        ids = tokens()[:, :BEFORE].to(next(model.parameters()).device)
        model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        for number, layer in enumerate(self.cache.layers):  # so that an exported graph has them as its state
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name}_{number}", value, persistent=False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        for layer in self.cache.layers:  # where tokens go is given: a package of AOTInductor counts on wrongly itself
            layer.cumulative_length.copy_(position[0, 0])
        made = self.model(ids, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return made.logits


def tokens() -> Tensor:
    """Returns the same ids for every row."""
    return torch.arange(100, 100 + PROMPT)[None]


def eager(model: nn.Module) -> float:
    """Returns the median seconds of a token, with the cache that ``generate`` uses."""
    from transformers import DynamicCache

    ids, taken = tokens(), []
    cache = DynamicCache(config=model.config)
    model(ids[:, :BEFORE], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for at in range(BEFORE, BEFORE + STEPS):
        start = time.perf_counter()
        model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def compiled(model: nn.Module) -> float:
    """The same of one graph a token, with a static cache."""
    step = Step(model, 256)
    options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # which take milliseconds a token
    options |= rpqfx.inductor_options()
    return by_steps(torch.compile(step, fullgraph=True, dynamic=False, options=options))[0]


def packaged(model: nn.Module) -> tuple[float, float]:
    """The same of a package of AOTInductor, and how far its last logits are from the model's own, relatively."""
    step = Step(model, 256)
    program = torch.export.export(step, (tokens()[:, :1], torch.tensor([[BEFORE]])), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/step.pt2", inductor_configs=rpqfx.inductor_options()
        )
        taken, logits = by_steps(torch._inductor.aoti_load_package(path))
    whole = model(tokens()[:, : BEFORE + STEPS], use_cache=False, logits_to_keep=1).logits
    return taken, float((logits - whole).norm() / whole.norm())


def by_steps(step: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
    """Returns the median seconds of a token, without the first five, and the logits of the last."""
    ids, taken = tokens(), []
    for at in range(BEFORE, BEFORE + STEPS):
        position = torch.tensor([[at]])
        start = time.perf_counter()
        logits = step(ids[:, at : at + 1], position)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[5:]), logits


def prompt(model: nn.Module) -> float:
    """Returns the seconds of a prompt, the better of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        model(tokens(), use_cache=False, logits_to_keep=1)
        taken.append(time.perf_counter() - start)
    return min(taken)


def perplexity(model: nn.Module) -> float | None:
    """Returns the perplexity of the kit's fast text, or None without the kit."""
    if "RPQFX_EVALKIT" not in os.environ:
        return None
    from convert_models import kit

    return float(kit().eval_ppl(model, kit().load_smollm2()[1], max_tokens=8192))


# ----------------------------------------------------------------------------------------------------- rows


def resident() -> int:
    """Returns the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def torch_row(model: str, build: Callable[[], nn.Module], file: Path | None, package: bool = True) -> dict[str, Any]:
    """Measures a model that runs on torch."""
    with torch.inference_mode():
        eager(small())  # whatever a first model brings into memory
    gc.collect()
    before = resident()
    made = build()
    with torch.inference_mode():
        row: dict[str, Any] = {"eager_s": eager(made)}
        row["grown_bytes"] = resident() - before
        row["tensor_bytes"] = sum({t.data_ptr(): t.nbytes for t in (*made.parameters(), *made.buffers())}.values())
        row["prompt_s"] = prompt(made)
        row["compiled_s"] = compiled(made)
    if package:
        with torch.no_grad():
            row["packaged_s"], row["packaged_error"] = packaged(made)
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
    """Measures a GGUF file of the kit's weights, of one type."""
    import cyllama.llama.llama_cpp as llama  # type: ignore[import-not-found]
    from convert_models import kit

    models = kit().MODELS / "smollm2"
    source = str(next(models.glob("*Q4_1.gguf")))
    path = str(folder / f"{model}-{kind}.gguf")
    if not os.path.exists(path):
        options = llama.LlamaModelQuantizeParams()
        options.ftype, options.allow_requantize, options.nthread = TYPES[kind], True, 2
        llama.model_quantize(source, path, options)
    of_model = llama.LlamaModelParams()
    of_model.n_gpu_layers = 0
    made = llama.LlamaModel(path_model=path, params=of_model)
    options = llama.LlamaContextParams()
    options.n_ctx, options.n_batch, options.n_ubatch = 2048, 1024, 512
    options.n_threads = options.n_threads_batch = 2
    context = llama.LlamaContext(model=made, params=options)
    ids = tokens()[0].tolist()

    def timed(some: list[int], position: int, logits: bool) -> float:
        batch = llama.LlamaBatch(n_tokens=len(some), embd=0, n_seq_max=1)
        batch.set_batch(some, position, logits)
        start = time.perf_counter()
        context.decode(batch)
        context.synchronize()
        return time.perf_counter() - start

    whole = []
    for _ in range(3):
        context.kv_cache_clear()
        whole.append(timed(ids, 0, False))
    context.kv_cache_clear()
    timed(ids[:BEFORE], 0, False)
    steps = [timed([ids[at]], at, True) for at in range(BEFORE, BEFORE + STEPS)]
    from transformers import AutoModelForCausalLM

    same = AutoModelForCausalLM.from_pretrained(folder, gguf_file=Path(path).name, dtype=torch.float32).eval()
    return {
        "eager_s": statistics.median(steps), "prompt_s": min(whole), "file_bytes": os.path.getsize(path),
        "perplexity": perplexity(same),
    }  # fmt: skip


KINDS: dict[str, Callable[[str, str, Path], dict[str, Any]]] = {
    "dense": plain, "rpqfx": ours, "torchao": torchao, "llama.cpp": llama_cpp,
}  # fmt: skip


def rows_of(model: str, bits: Sequence[float]) -> list[tuple[str, str]]:
    """Returns the rows that this machine's packages allow."""
    rows = [("dense", "float32"), ("dense", "bfloat16"), *[("rpqfx", str(one)) for one in bits]]
    if importlib.util.find_spec("torchao"):
        rows += [("torchao", "int8"), ("torchao", "int4")]
    if importlib.util.find_spec("cyllama") and model == "SmolLM2":
        rows += [("llama.cpp", kind) for kind in TYPES]
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
