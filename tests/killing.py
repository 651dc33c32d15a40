"""Saves over a file again and again, is killed at any moment while it does, and says what was there each time.

Run as ``python -m tests.killing folder suffix times seed``. One process imports torch; it forks for each save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import rpqfx


def build() -> nn.Module:
    """The dense model, of some hundred kilobytes when it is saved."""
    return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))


def outputs(model: nn.Module) -> list[float]:
    """What tells one model from another."""
    with torch.no_grad():
        return [round(float(y), 4) for y in model.eval()(torch.ones(1, 256))[0, :8]]


def is_left_over(name: str, path: Path) -> bool:
    """Whether a file is a draft of ours, or one that safetensors writes before it renames it to our draft."""
    ours = name.startswith(path.name) and name.endswith(".part")
    return ours or (path.suffix == ".safetensors" and name.startswith(".tmp"))


def main(folder: Path, suffix: str, times: int, seed: int) -> dict[str, int]:
    """Kills so many saves, and counts which model the file holds afterwards and what drafts are left.

    Raises:
        AssertionError: If the file holds anything but the model of before or the one that was being saved.
    """
    torch.set_num_threads(1)  # a forked process has none of the threads of the one it is a copy of
    rng, path = random.Random(seed), folder / f"model{suffix}"
    policy = rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=8)
    models = [rpqfx.rpqify(build(), policy) for _ in range(2)]
    wanted = [outputs(model) for model in models]
    began = time.perf_counter()
    rpqfx.save(models[0], path)
    took = time.perf_counter() - began
    held, counts = 0, {"old": 0, "new": 0, "drafts": 0}
    for _ in range(times):
        child = os.fork()
        if not child:
            rpqfx.save(models[1 - held], path)
            os._exit(0)
        time.sleep(rng.uniform(0, 1.5 * took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = outputs(rpqfx.load(path, build))
        assert found in wanted, f"the file holds {found}"
        counts["old" if found == wanted[held] else "new"] += 1
        held = wanted.index(found)
        drafts = [other for other in folder.iterdir() if other != path]
        assert all(is_left_over(d.name, path) for d in drafts), drafts
        counts["drafts"] += len(drafts)
        for draft in drafts:
            draft.unlink()
    return counts


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
