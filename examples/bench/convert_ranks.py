"""Processor time of a conversion that processes share, by process.

    torchrun --nproc-per-node 1 examples/bench/convert_ranks.py
    torchrun --nproc-per-node 2 examples/bench/convert_ranks.py

Blocks of SmolLM2-135M's widths with random weights, at 3 bits. Processor time, as several processes may have one
machine; what they wait for each other is not in it. The digest of the result is the same for every number of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import time

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import rpqfx
import rpqfx.distributed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of each of the two sequences of a batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=arguments.width, intermediate_size=arguments.width * 8 // 3,
        num_hidden_layers=arguments.blocks, num_attention_heads=arguments.width // 64,
        num_key_value_heads=max(1, arguments.width // 192), tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    batches = list(torch.randint(2000, (arguments.batches, 2, arguments.tokens)))
    policy, began, used = rpqfx.Policy.pretrained(3), time.perf_counter(), processor_seconds()
    if dist.get_world_size() == 1:
        small = rpqfx.convert(model, policy, batches, progress=False)
    else:
        small = rpqfx.distributed.convert(model, policy, batches, progress=False)
    digest = hashlib.sha256()
    for tensor in small.state_dict().values():
        digest.update(bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist()))
    print(
        f"process {dist.get_rank()} of {dist.get_world_size()}: {processor_seconds() - used:.1f} s of processor time, "
        f"{time.perf_counter() - began:.1f} s in all, result {digest.hexdigest()[:16]}",
        flush=True,
    )
    dist.destroy_process_group()


def processor_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


if __name__ == "__main__":
    main()
