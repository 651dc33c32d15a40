"""The two models that RPQ-pytorch reports, unmodified, at or under its sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rpqfx

pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[2] / "examples" / "bench" / "sizes.py"


def sizes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizes", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("needs", "build", "theirs"),
    [("vit_pytorch", "vit_giant", 361.429), ("transformers", "opt_66b", 5885.707)],
)
@pytest.mark.parametrize("split", ["auto", "row"])
def test_one_codebook_per_head_is_no_larger_than_theirs(needs: str, build: str, theirs: float, split: str) -> None:
    """float32, MiB, every tensor counted; and nothing is allocated on the way."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed (extra: examples)")
    with torch.device("meta"):
        dense = getattr(sizes(), build)()
    small = rpqfx.rpqify(dense, rpqfx.Policy.from_scratch(num_subvectors="heads", split=split))
    assert rpqfx.report(small).after / 2**20 <= theirs
    assert all(tensor.is_meta for tensor in (*small.parameters(), *small.buffers()))
