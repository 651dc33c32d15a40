"""Everything that a GPU has to show, in one go of at most eight minutes: kernels, layers, decoding, KV cache, routing.

    pip install -e ".[transformers]"
    python examples/bench/gpu.py                                # writes examples/results/gpu-<device>.json
    TRITON_INTERPRET=1 python examples/bench/gpu.py --small     # the same on a CPU, in tiny shapes, to see that it runs

Each section stands beside torch's dense kernels on the same device. A section that fails is in the file with its error,
and the others go on. Layers are timed as graphs of CUDA (``graph_us``: nothing but the device) and as they are called
from Python (``eager_us``). Each row goes through so many copies of a layer that the dense ones do not fit the caches.
Errors are against float64, the largest over the largest element.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import decode
import decode_steps
import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpqfx
from rpqfx.codebook import CodebookSpec
from rpqfx.nn import RPQWeight
from rpqfx.ops.cuda import kernels as cuda
from rpqfx.routing import RoutedTransformerBlock, coordinate_descent, exact_scores

BY_DTYPE = ("from scratch 9216 x 9216", "converted 3 bits 8192 x 2048")  # layers that are measured in every dtype
Run = Callable[[], object]
Row = dict[str, Any]
COLD = 2**28  # bytes of dense copies
SECONDS = 400  # after which no section begins
ENCODING = 15  # seconds of encoding a cache


class Device:
    """Where it runs, and what sizes fit there.

    Args:
        small: Whether shapes are tiny.
    """

    def __init__(self, small: bool) -> None:
        self.small = small
        self.name = "cuda" if torch.cuda.is_available() else "cpu"
        self.gpu = self.name == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def eager_us(self, runs: list[Run], rounds: int = 7) -> float:
        """Microseconds of a run when all are called one after the other: the median of some rounds."""
        times = []
        for _ in range(rounds + 2):
            self.wait()
            start = time.perf_counter()
            for run in runs:
                run()
            self.wait()
            times.append((time.perf_counter() - start) / len(runs))
        return 1e6 * statistics.median(times[2:])

    def graph_us(self, runs: list[Run], rounds: int = 20) -> float | None:
        """Microseconds of a run in a graph of all of them."""
        if not self.gpu:
            for run in runs:
                run()
            return None
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        times = []
        for _ in range(rounds + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            self.wait()
            times.append(1e3 * start.elapsed_time(end) / len(runs))
        return statistics.median(times[3:])

    def times(self, runs: list[Run]) -> Row:
        return {"eager_us": self.eager_us(runs), "graph_us": self.graph_us(runs)}


def error(found: Tensor, exact: Tensor) -> float:
    """Returns the largest difference over the largest element."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


# ------------------------------------------------------------------------------------------------------- layers


def filled(spec: CodebookSpec, device: Device, dtype: torch.dtype) -> RPQWeight:
    """Returns a weight with random codebooks and codes, made on the device."""
    weight = RPQWeight(spec, device="meta", dtype=dtype).to_empty(device=device.name).requires_grad_(False)
    weight.codebooks.normal_(0, (spec.stages * spec.dim) ** -0.5)
    for factors in (weight.scale, weight.column_scale):
        if factors is not None:
            factors.uniform_(0.5, 1.5)
    codes = weight.stored_codes
    if spec.tiled:
        codes.random_(0, 256)  # any byte is two codes
    else:
        weight.codes = torch.randint(spec.entries, spec.codes_shape, device=device.name).to(spec.code_dtype)
    return weight


def scratch_spec(out: int, wide: int, books: int) -> CodebookSpec:
    return CodebookSpec(out, wide, wide // books, 256)


def converted_spec(out: int, wide: int, d: int, stages: int) -> CodebookSpec:
    return CodebookSpec(out, wide, d, 16, stages, 1, scale=True, column_scale_group=1, tiled=True)


def layers(device: Device) -> Iterator[Row]:
    """Products of layers that were trained in codebooks, and of converted ones, by rows."""
    shapes = {
        "from scratch 9216 x 9216": scratch_spec(9216, 9216, 72),
        "from scratch 4096 x 4096": scratch_spec(4096, 4096, 32),
        "converted 3 bits 2048 x 2048": converted_spec(2048, 2048, 8, 6),
        "converted 3 bits 8192 x 2048": converted_spec(8192, 2048, 8, 6),
        "converted 3 bits 2048 x 8192": converted_spec(2048, 8192, 8, 6),
        "converted 2 bits 8192 x 2048": converted_spec(8192, 2048, 8, 4),
        "converted 4 bits 8192 x 2048": converted_spec(8192, 2048, 4, 4),
    }
    batches, dtypes = (1, 4, 16, 64, 512), (torch.bfloat16, torch.float16, torch.float32)
    if device.small:
        shapes = {"from scratch": scratch_spec(64, 32, 2), "converted 3 bits": converted_spec(130, 32, 8, 6)}
        batches, dtypes = (1, 20), (torch.bfloat16,)
    for name, spec in shapes.items():
        for dtype in dtypes:
            if dtype is not torch.bfloat16 and name not in BY_DTYPE:
                continue
            yield from of_layer(device, name, spec, dtype, batches)


def of_layer(
    device: Device, name: str, spec: CodebookSpec, dtype: torch.dtype, batches: tuple[int, ...]
) -> Iterator[Row]:
    """One shape in one dtype: ours in each way, and the dense product."""
    size = spec.num_vectors * spec.dim * 2
    copies = 2 if device.small else min(16, max(2, -(-COLD // size)))
    weights = [filled(spec, device, dtype) for _ in range(copies)]
    dense = [torch.randn(spec.num_vectors, spec.dim, device=device.name, dtype=dtype) for _ in range(copies)]
    exact = weights[0]().double()
    for rows in batches:
        x = torch.randn(rows, spec.dim, device=device.name, dtype=dtype)
        row: Row = {"layer": name, "dtype": str(dtype).removeprefix("torch."), "rows": rows}
        row["dense"] = device.times([partial(F.linear, x, w) for w in dense])
        for plan in ("auto", "lookup", "dequantize"):
            for weight in weights:
                weight.plan = plan  # type: ignore[assignment]
            row[plan] = device.times([partial(w.linear, x) for w in weights])
            row[plan]["error"] = error(weights[0].linear(x), x.double() @ exact.t())
        yield row


def ways_of_tiles(device: Device) -> Iterator[Row]:
    """The two ways of a product with codes in tiles, by rows: where one becomes faster than the other."""
    spec = converted_spec(64, 32, 8, 6) if device.small else converted_spec(8192, 2048, 8, 6)
    weights = [filled(spec, device, torch.bfloat16).tensors for _ in range(8)]
    for rows in (1, 2, 4, 8, 16, 64, 128, 512):
        if device.small and rows not in (2, 32):
            continue
        x = torch.randn(rows, spec.dim, device=device.name, dtype=torch.bfloat16)
        row: Row = {"rows": rows}
        for way, plan in (("by_table", "lookup"), ("expanded", "dequantize")):
            row[way] = device.graph_us([
                partial(cuda.tiled, x, w.codebooks, w.codes, w.tiled, None, plan) for w in weights
            ])  # fmt: skip
        yield row


def forward_backward(layer: Callable[[Tensor], Tensor], parameter: Tensor, x: Tensor) -> None:
    y = layer(x)
    torch.autograd.grad(y, [x, parameter], torch.ones_like(y))


def training(device: Device) -> Iterator[Row]:
    """A step forwards and backwards of a layer that is trained in codebooks."""
    cases = ((9216, 72, 512), (4096, 32, 2048)) if not device.small else ((32, 2, 20),)
    for wide, books, rows in cases:
        x = torch.randn(rows, wide, device=device.name, dtype=torch.bfloat16, requires_grad=True)
        dense = nn.Linear(wide, wide, bias=False, device=device.name, dtype=torch.bfloat16)
        weight = filled(scratch_spec(wide, wide, books), device, torch.bfloat16).requires_grad_(True)
        row: Row = {"layer": f"{wide} x {wide}, {books} codebooks", "rows": rows}
        layers: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = [
            ("dense", dense, dense.weight), ("ours", weight.linear, weight.codebooks)
        ]  # fmt: skip
        for name, layer, parameter in layers:
            step = partial(forward_backward, layer, parameter, x)
            if device.gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            row[name] = {"eager_us": device.eager_us([step] * 3)}
            if device.gpu:
                row[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        yield row


# ----------------------------------------------------------------------------------------------------- decoding


def language_model(device: Device, bits: float | None) -> nn.Module:
    """Returns a model of 1B shapes with random numbers, made on the device; dense or quantized."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(decode.SHAPE_1B)
    if device.small:
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 640}  # fmt: skip
    config = LlamaConfig(**sizes)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if bits is not None:
        model = decode.with_random_codes(model, rpqfx.Policy.pretrained(bits))
    model = model.to_empty(device=device.name).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    for module in model.modules():
        if isinstance(module, RPQWeight):
            module.codebooks.normal_(0, 0.02 * module.spec.stages**-0.5)
            module.stored_codes.random_(0, 256 if module.spec.tiled else module.spec.entries)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device.name)
    return model


def decoding(device: Device) -> Iterator[Row]:
    """Single tokens of a model with 1B shapes, bfloat16: as called, and compiled into a graph."""
    count = 32 if not device.small else 2
    for name, bits in (("dense", None), ("rpqfx 3.0", 3.0)):
        model = language_model(device, bits)
        held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        row: Row = {"model": name, "tensor_bytes": sum(held.values())}
        ids = decode_steps.tokens().to(device.name)
        with torch.inference_mode():
            whole = model(ids[:, : decode_steps.BEFORE + count], use_cache=False, logits_to_keep=1).logits
            step = decode_steps.Step(model, 256)
            row["eager_s"], logits = by_steps(device, step, ids, count)
            row["eager_error"] = error(logits, whole.double())
            row["prompt_s"] = 1e-6 * device.eager_us([partial(model, ids, use_cache=False, logits_to_keep=1)], 3)
            if device.gpu:
                step = decode_steps.Step(model, 256)
                fast = torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")
                row["compiled_s"], logits = by_steps(device, fast, ids, count)
                row["compiled_error"] = error(logits, whole.double())
        yield row


def by_steps(device: Device, step: Callable[..., Tensor], ids: Tensor, count: int) -> tuple[float, Tensor]:
    """Returns the median seconds of a token, without the first ones, and the logits of the last."""
    taken = []
    for at in range(decode_steps.BEFORE, decode_steps.BEFORE + count):
        position = torch.tensor([[at]], device=device.name)
        one = ids[:, at : at + 1].clone()
        device.wait()
        start = time.perf_counter()
        logits = step(one, position).clone()
        device.wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[min(8, count - 1) :]), logits


# ------------------------------------------------------------------------------------------- KV cache and routing


class Attention(nn.Module):
    """Attention of queries, keys and values that are given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def kv(device: Device) -> Iterator[Row]:
    """Attention of one token to 32,768 on codes, eight heads of keys and 32 of queries, beside torch's attention."""
    from rpqfx.kv import CodebookCache, KVPolicy

    long, heads, chunk, copies = (32_768, 8, 4096, 4) if not device.small else (512, 2, 256, 1)
    numbers = torch.Generator(device.name).manual_seed(0)

    def tokens(count: int, some: int) -> Tensor:
        return torch.randn(1, some, count, 64, generator=numbers, device=device.name, dtype=torch.float32) / 8

    q = tokens(1, 4 * heads)
    held = [(tokens(long, heads), tokens(long, heads)) for _ in range(copies)]
    for dtype in (torch.float32, torch.bfloat16):
        some = [(k.to(dtype), v.to(dtype)) for k, v in held]
        turn = q.to(dtype)
        runs: list[Run] = [partial(F.scaled_dot_product_attention, turn, k, v, enable_gqa=True) for k, v in some]
        bytes_ = some[0][0].nbytes * 2
        yield {"attention": "dense", "dtype": str(dtype), "bytes": bytes_, **device.times(runs)}
    calibration = [tuple(tokens(256, some).cpu() for some in (4 * heads, heads, heads)) for _ in range(2)]
    for bits in (4, 2):
        policy = KVPolicy(
            bits_per_value=bits, window=128, keys="after"
        )  # fitted on the CPU: it is thousands of small steps
        small = rpqfx.quantize_kv(Attention(), policy, calibration=calibration, progress=False).to(device.name)
        store, (k, v) = next(iter(CodebookCache(small).stores.values())), held[0]
        taken: list[float] = []
        while store.total < long and sum(taken) < ENCODING:
            began, some = time.perf_counter(), slice(store.total, store.total + chunk)
            store.append(k[:, :, some], v[:, :, some])
            device.wait()
            taken.append(time.perf_counter() - began)
        row: Row = {"attention": f"rpqfx {bits} bits", "bytes": sum(store.nbytes().values()), "tokens": store.total}
        row["encode_us_per_token"] = 1e6 * min(taken) / chunk
        yield {**row, "eager_us": device.eager_us([partial(store.attend, q)])}


def search(device: Device) -> Iterator[Row]:
    """The residual search that encodes a cache: the kernel, and torch's own operators stage by stage."""
    from rpqfx.ops.search import _greedy

    count, cases = (8192, ((8, 2048, 32), (2, 256, 8))) if not device.small else (64, ((2, 16, 4),))
    for stages, entries, d in cases:
        points = torch.randn(count, d, device=device.name)
        books = torch.randn(stages, entries, d, device=device.name)
        row: Row = {"points": count, "stages": stages, "entries": entries, "d": d}
        row["kernel"] = {"eager_us": device.eager_us([partial(cuda.residual_search, points, books)])}
        with patch.object(cuda, "usable", return_value=False):
            row["operators"] = {"eager_us": device.eager_us([partial(_greedy, points, books, False)])}
        yield row


def routing(device: Device) -> Iterator[Row]:
    """The routers, and a routed block beside a full one."""
    batch, count, dim, heavy = (2, 32_768, 512, 1024) if not device.small else (1, 64, 32, 8)
    scores = torch.randn(batch, count, device=device.name)
    routers: dict[str, Run] = {
        "exact": lambda: exact_scores(scores, heavy, eps=0.1),
        "coordinate descent, 50 iterations": lambda: coordinate_descent(scores, heavy, eps=0.1),
    }
    for name, run in routers.items():
        yield {"router": name, "eager_us": device.eager_us([run])}
    numbers = {f"num_heavy_{which}": heavy for which in ("attn_tokens_q", "attn_tokens_kv", "ff_tokens")}
    x = torch.randn(batch, count, dim, device=device.name, dtype=torch.bfloat16)
    full = nn.TransformerEncoderLayer(dim, 8, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
    blocks = {"full": full.eval(), "routed": RoutedTransformerBlock(dim, **numbers).eval()}
    for name, block in blocks.items():
        block.to(device.name, torch.bfloat16).requires_grad_(False)
        yield {"block": name, "eager_us": device.eager_us([partial(block, x)], 3)}


def ceilings(device: Device) -> Iterator[Row]:
    """What the device moves and multiplies."""
    large = torch.empty(2**28 if device.gpu else 2**20, device=device.name)
    square = torch.randn(*[8192 if device.gpu else 256] * 2, device=device.name, dtype=torch.bfloat16)
    into = torch.empty_like(large)
    moved = device.eager_us([lambda: into.copy_(large)] * 4)
    multiplied = device.eager_us([lambda: square @ square] * 4)
    yield {"copied_gb_s": 2e-3 * large.nbytes / moved, "bfloat16_tflops": 2e-6 * square.shape[0] ** 3 / multiplied}


SECTIONS: dict[str, Callable[[Device], Iterator[Row]]] = {
    one.__name__: one for one in (ceilings, layers, search, routing, training, ways_of_tiles, decoding, kv)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes, wherever it is")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="sections")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the file")
    args = parser.parse_args()
    device = Device(args.small)
    if not device.gpu and not args.small:
        parser.error("no CUDA device is found; --small runs tiny shapes in Triton's interpreter (TRITON_INTERPRET=1)")
    torch.manual_seed(0)
    began = time.perf_counter()
    found: dict[str, Any] = {"seed": 0, "small": args.small, "kernels_pass_their_check": None}
    if device.gpu:
        found["kernels_pass_their_check"] = cuda.usable(torch.empty(1, device="cuda"))
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if device.gpu else "interpreter"
    for section in args.only or SECTIONS:
        start, rows = time.perf_counter(), []
        entry: Row = {"rows": rows}
        if start - began > SECONDS:
            entry["left_out"] = f"{SECONDS} s were over"
        else:
            try:
                with torch.set_grad_enabled(section == "training"):
                    for row in SECTIONS[section](device):
                        rows.append(row)
                        print(section, row, flush=True)
            except Exception as failure:  # one section must not cost the others
                entry["failed"] = f"{type(failure).__name__}: {failure}"[:300]
                traceback.print_exc()
        entry["seconds"] = round(time.perf_counter() - start, 1)
        found[section] = entry
        results.write(f"gpu-{name}", "python examples/bench/gpu.py", found, args.out)


if __name__ == "__main__":
    main()
