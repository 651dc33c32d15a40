"""An OPT-66B generates within 7 GB of resident memory, as ``examples/02_opt66b.py`` measures it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "02_opt66b.py"
GIB = 2**30


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("opt66b", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read as Linux keeps them")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra: examples")
def test_it_generates_in_less_than_seven_gigabytes() -> None:
    """float32, every layer, in a process of its own; the example itself checks that the tokens came."""
    if available_bytes() < 10 * GIB:
        pytest.skip("less than 10 GiB of memory are available")
    run = example().in_process("float32", 4)
    assert len(run["ids"]) == run["tokens"] == 4 and all(0 <= token < 50272 for token in run["ids"])
    assert run["token_bytes"] < run["model_bytes"] < run["peak_bytes"] < 7e9
    assert run["token_s"] > 0 and run["roofline_s"] > 0


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra: examples")
def test_bytes_for_a_token_are_those_of_the_linear_layers() -> None:
    """Codebooks and codes of every linear layer, the head's once though the embedding holds them too."""
    opt = example()
    policy = opt.rpqfx.Policy.from_scratch(num_subvectors="heads")
    found = [opt.read_bytes(opt.rpqfx.rpqify(opt.build(torch.float32, n), policy, inplace=True)) for n in (1, 2)]
    book, codes = 4 * 256 * 9216, 72
    linears = 6 * book + codes * (4 * 9216 + 2 * 36864)  # the wide layers' vectors are as short as the others'
    assert found[1] - found[0] == linears
    assert found[0] - linears == book + codes * 50272
