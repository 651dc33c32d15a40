"""Rewriting is linear in the number of modules and needs no data."""

from __future__ import annotations

import time

import torch
from torch import nn

import rpqfx


def test_a_thousand_layers_take_seconds() -> None:
    """1,000 layers on the meta device, where nothing is drawn or fitted, are rewritten in under five seconds."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(500)))
    start = time.process_time()
    small = rpqfx.rpqify(model, rpqfx.Policy(bits=4, codebook_dim=16))
    assert time.process_time() - start < 5
    assert len(rpqfx.report(small).rewritten) == 1000
