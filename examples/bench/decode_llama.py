"""llama.cpp's rows of ``decode.py``: the same weights in its own types, through a prebuilt wheel (``cyllama``)."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TYPES = {"F32": 0, "Q8_0": 7, "Q4_0": 2, "Q3_K_S": 11, "IQ3_S": 26, "Q2_K": 10}


def write_gguf(model: nn.Module, path: Path) -> None:
    """Writes a Llama with tied embeddings as a GGUF file of float16 matrices, without a tokenizer."""
    import gguf  # type: ignore[import-not-found]

    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)  # float16
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, value in model.named_parameters():
        rotated = next((count for ending, count in heads.items() if name.endswith(ending)), None)
        made = interleaved(value.detach(), rotated) if rotated else value.detach()
        writer.add_tensor(
            names.get_name(name, (".weight",)), made.to(torch.float16 if made.dim() > 1 else torch.float32).numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Returns rows of queries or keys in GGUF's order: pairs that a rotary embedding turns lie side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def quantized(source: Path, kind: str, path: Path) -> None:
    """Writes a GGUF file in another type, unless it is there."""
    import cyllama.llama.llama_cpp as llama  # type: ignore[import-not-found]

    if path.exists():
        return
    options = llama.LlamaModelQuantizeParams()
    options.ftype, options.allow_requantize, options.nthread = TYPES[kind], True, 2
    llama.model_quantize(str(source), str(path), options)


def speed(path: Path, ids: Sequence[int], before: int, steps: int) -> dict[str, Any]:
    """Returns the median seconds of single tokens after ``before``, and the better of three prompts of all ids."""
    import cyllama.llama.llama_cpp as llama

    of_model = llama.LlamaModelParams()
    of_model.n_gpu_layers = 0
    made = llama.LlamaModel(path_model=str(path), params=of_model)
    options = llama.LlamaContextParams()
    options.n_ctx, options.n_batch, options.n_ubatch = 2048, 1024, 512
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = llama.LlamaContext(model=made, params=options)

    def timed(some: Sequence[int], position: int, logits: bool) -> float:
        batch = llama.LlamaBatch(n_tokens=len(some), embd=0, n_seq_max=1)
        batch.set_batch(list(some), position, logits)
        start = time.perf_counter()
        context.decode(batch)
        context.synchronize()
        return time.perf_counter() - start

    whole = []
    for _ in range(3):
        context.kv_cache_clear()
        whole.append(timed(ids, 0, False))
    context.kv_cache_clear()
    timed(ids[:before], 0, False)
    tokens = [timed([ids[at]], at, True) for at in range(before, before + steps)]
    return {"eager_s": statistics.median(tokens), "prompt_s": min(whole), "file_bytes": os.path.getsize(path)}
