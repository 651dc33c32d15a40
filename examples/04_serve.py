"""A converted language model, loaded from its file and decoded: tokens a second, and memory.

    pip install -e ".[transformers]"
    python examples/04_serve.py                     # a small Llama with random weights, converted first
    python examples/04_serve.py model.rpq folder    # a file that rpqfx.save wrote, and a folder with its config

The dense model is never made: it is built on the meta device, and codebooks and codes come from the file.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import rpqfx

SMALL = LlamaConfig(
    hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=4096, tie_word_embeddings=True,
)  # fmt: skip


def resident() -> float:
    """Returns the megabytes of memory that this process holds (0 where the system does not say)."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if path.exists() else 0.0


def convert_small(folder: Path) -> Path:
    torch.manual_seed(0)
    small = rpqfx.rpqify(AutoModelForCausalLM.from_config(SMALL).eval(), rpqfx.Policy.pretrained(3))
    print(rpqfx.report(small).bits_per_weight, "bits a weight")
    rpqfx.save(small, folder / "small.rpq")
    return folder / "small.rpq"


def serve(path: Path, config: PreTrainedConfig, new_tokens: int = 64) -> None:
    before = resident()
    model = rpqfx.load(path, lambda: AutoModelForCausalLM.from_config(config)).eval()
    print(f"file {path.stat().st_size / 1e6:.1f} MB, process grown by {resident() - before:.1f} MB")
    ids = torch.arange(1, 33)[None]
    model.generate(ids, max_new_tokens=2, do_sample=False)  # kernels are compiled and checked at their first use
    start = time.perf_counter()
    made = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    taken = time.perf_counter() - start
    print(f"{new_tokens / taken:.1f} tokens a second, eager, process grown by {resident() - before:.1f} MB")
    assert made.shape[1] == ids.shape[1] + new_tokens


def main() -> None:
    torch.set_num_threads(2)
    if len(sys.argv) == 3:
        serve(Path(sys.argv[1]), AutoConfig.from_pretrained(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        serve(convert_small(Path(folder)), SMALL)


if __name__ == "__main__":
    main()
