"""The example of several processes runs by torchrun, and each way of training comes to the loss of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not built in"),
]
ROOT = Path(__file__).parents[2]


def test_the_example_trains_to_the_loss_of_one_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/05_distributed.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RPQFX_KERNELS": "0"}
    done = subprocess.run(
        [*command, "--steps", "2"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(\w+) +(one process|DDP|FSDP2) +loss ([\d.]+), sent .*? ([\d,]+) bytes.*, codebooks ([\d,]+) bytes$",
        done.stdout,
        re.MULTILINE,
    )
    assert len(rows) == 6
    for kind in ("dense", "codebooks"):
        losses = [float(loss) for found, _, loss, *_ in rows if found == kind]
        assert max(losses) - min(losses) < 2e-3
    sent = {(kind, how): int(count.replace(",", "")) for kind, how, _, count, _ in rows}
    (codebooks,) = {int(count.replace(",", "")) for kind, _, _, _, count in rows if kind == "codebooks"}
    assert codebooks < sent["codebooks", "DDP"] <= 1.05 * codebooks
    assert all(sent["codebooks", how] < 0.1 * sent["dense", how] for how in ("DDP", "FSDP2"))
