"""Jobs with a checkpoint that are killed and run again, each in a process forked from one that has torch loaded.

    python -m tests.kills FOLDER COUNT SEED JOB...

prints what came of each as a line of JSON. A process of its own, because a fork of one whose torch has threads may
hang.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.storage.files import take_in
from rpqfx.training import Rates
from tests import forks

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir")


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.BatchNorm1d(16)).eval()


_POLICY = Policy(codebook_dim=4, codebook_bits=3, scale=True, sharing="shape", min_size=200)


def _alone(folder: pathlib.Path) -> dict[str, Tensor]:
    policy = Policy.pretrained(bits_per_weight=5, min_size=200)
    return rpqfx.convert(_model()[0], policy, None, checkpoint=folder).state_dict()


def _converted(folder: pathlib.Path) -> dict[str, Tensor]:
    batches = list(_numbers(2, 24, 16))
    return rpqfx.convert(_model(), _POLICY, batches, checkpoint=folder, progress=False).state_dict()


def _finetuned(folder: pathlib.Path) -> dict[str, Tensor]:
    dense, small = copy.deepcopy(_pair())
    done = rpqfx.finetune(
        small, teacher=dense, data=list(_numbers(4, 16, 16)), steps=12, norms="update", accumulate=2,
        rates=Rates(codebooks=1e-2, codes=0.3), checkpoint=folder, checkpoint_every=2,
    )  # fmt: skip
    return {**small.state_dict(), "losses": torch.tensor(done.losses), "recoded": torch.tensor(done.recoded)}


@functools.cache
def _pair() -> tuple[nn.Module, nn.Module]:
    dense = _model()
    return dense, rpqfx.rpqify(dense, _POLICY)


JOBS: dict[str, Callable[[pathlib.Path], dict[str, Tensor]]] = {
    "weights alone": _alone,
    "calibrated": _converted,
    "fine-tuned": _finetuned,
}


def _sum(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        take_in(digest, tensor, name)
    return digest.hexdigest()


def _forked(work: Callable[[], str], delay: float | None = None) -> tuple[str, bool]:
    """What some work wrote in a process of its own, and whether that was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            os.write(writer, work().encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    text = b""
    while part := os.read(reader, 65536):
        text += part
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return text.decode(), os.WIFSIGNALED(status)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Points:
    """Kills its process at one of the points where it touches a folder.

    Those are the calls of the system that name something in it; and, for each file of tensors, after half of it.

    Args:
        folder: The folder.
        at: Which point; None to count them.
    """

    def __init__(self, folder: pathlib.Path, at: int | None) -> None:
        self._folder, self._at, self.count = str(folder), at, 0
        sys.addaudithook(self._heard)
        self._save, torch.save = torch.save, self._half

    def _point(self) -> bool:
        self.count += 1
        return self.count - 1 == self._at

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        named = [str(arg) for arg in args if isinstance(arg, (str, os.PathLike))]
        if event in _EVENTS and any(name.startswith(self._folder) for name in named) and self._point():
            _die()

    def _half(self, held: Any, path: Any) -> None:
        if self._point():
            whole = io.BytesIO()
            self._save(held, whole)
            pathlib.Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
            _die()
        self._save(held, path)


def killed(job: str, folder: pathlib.Path, count: int, seed: int) -> dict[str, Any]:
    """Kills a job at many points, lets it run to its end each time, and compares.

    Args:
        job: One of ``JOBS``.
        folder: An empty one.
        count: How often; half of them, if there are as many, where it touches its folder.
        seed: Of the others, which are spread over the time that it takes.

    Returns:
        How many were killed ("points" and "delays"; a job that was over before the delay counts as "late"), and what
        went "wrong".
    """
    run = JOBS[job]

    def whole(place: pathlib.Path) -> str:
        return _sum(run(place))

    def pointed(place: pathlib.Path, at: int | None) -> str:
        points = _Points(place, at)
        done = whole(place)
        return str(points.count) if at is None else done

    wanted, _ = _forked(lambda: whole(folder / "undisturbed"))
    began = time.perf_counter()
    again, _ = _forked(lambda: whole(folder / "undisturbed again"))
    assert again == wanted, (wanted, again)
    seconds = time.perf_counter() - began
    number = int(_forked(lambda: pointed(folder / "counted", None))[0])
    draws = random.Random(seed)
    ats: list[int | None] = sorted(draws.sample(range(number), min(number, (count + 1) // 2)))  # type: ignore[assignment]
    ats += [None] * (count - len(ats))
    found: dict[str, Any] = {"job": job, "points": 0, "delays": 0, "late": 0, "resumed": 0, "wrong": []}
    for trial, at in enumerate(ats):
        place = folder / f"trial {trial}"
        if at is not None:
            _, dead = _forked(lambda place=place, at=at: pointed(place, at))
            found["points"] += dead
        else:
            _, dead = _forked(lambda place=place: whole(place), draws.uniform(0, seconds))
            found["delays" if dead else "late"] += 1
        found["resumed"] += place.exists() and any(path.suffix == ".pt" for path in place.iterdir())
        again, _ = _forked(lambda place=place: whole(place))
        left = [path.name for path in place.iterdir() if path.suffix == ".part"]
        if again != wanted or left or (at is not None and not dead):
            found["wrong"].append([trial, at, again[:200], left])
        shutil.rmtree(place)
    return found


def run_apart(jobs: Iterable[str], folder: pathlib.Path, count: int, seed: int) -> list[dict[str, Any]]:
    """``killed`` for some jobs in a process that has done nothing else, with one thread."""
    done = forks.run(forks.module("tests.kills"), str(folder), str(count), str(seed), *jobs)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # as the first step of an optimiser does
    _pair()
    for name in sys.argv[4:]:
        own = pathlib.Path(sys.argv[1]) / name
        own.mkdir()
        print(json.dumps(killed(name, own, int(sys.argv[2]), int(sys.argv[3]))))
