"""Fine-tuning with a checkpoint: goes on to the same bits wherever it stopped, and takes on nothing that is not its."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.conversion import checkpoint as checkpoints
from rpqfx.errors import FormatError, InputError, TrainingError
from rpqfx.nn import RPQWeight
from rpqfx.training import Distillation, Rates
from rpqfx.training.finetune import Finetuned
from tests.helpers import generator

FAST = Rates(codebooks=1e-2, scales=1e-2, dense=1e-2, codes=0.3)
STEPS = 7


class Net(nn.Module):
    """A convolution, a batch norm, and two linear layers that share their codebooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.one, self.two = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).mean(-1)
        return self.one(y) + torch.tanh(self.two(y))


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = Net().eval()
    policy = {"codebook_dim": 4, "codebook_bits": 3, "sharing": "shape", "scale": True, "min_size": 64, **options}
    return dense, rpqfx.rpqify(dense, Policy(**policy))


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    g = generator(seed)
    return [torch.randn(4, 4, 6, generator=g) for _ in range(count)]


def tuned(
    folder: Any = None, *, policy: dict[str, Any] | None = None, model: Any = None, **options: Any
) -> tuple[nn.Module, Finetuned]:
    dense, small = model or pair(**(policy or {}))
    if folder is not None:
        options = {"checkpoint": folder, "checkpoint_every": 2, **options}
    given = {"teacher": dense, "data": batches(), "steps": STEPS, "rates": FAST, **options}
    return small, rpqfx.finetune(small, **given)


def stopped(folder: Any, at: int, **options: Any) -> None:
    def stop(done: int, total: int, words: str) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(folder, progress=stop, **options)


def same(one: tuple[nn.Module, Finetuned], other: tuple[nn.Module, Finetuned]) -> bool:
    ours, theirs = one[0].state_dict(), other[0].state_dict()
    results = [(r.losses, r.weights, r.trained, r.recoded, r.codes) for r in (one[1], other[1])]
    return results[0] == results[1] and all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Loader:
    """Goes through its batches in an order that it draws from torch's global generator, as a DataLoader does."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([batches()[number] for number in torch.randperm(3).tolist()])


def noisy_loss(found: Tensor, wanted: Tensor, batch: Any) -> Tensor:
    return Distillation()(found + 0.1 * torch.randn(found.shape), wanted)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no codes": {"recode": False},
    "codes now and then": {"recode_every": 3},
    "two stages": {"policy": {"stages": 2}},
    "signs": {"policy": {"signs": True}},
    "own codebooks": {"policy": {"sharing": "own", "column_scale": True}},
    "norms": {"norms": "update"},
    "autocast": {"autocast": torch.bfloat16},
    "accumulate": {"accumulate": 2},
    "clipped": {"clip": 0.01, "seed": 3},
    "a few names": {"train": lambda name: "one" in name},
    "every step": {"checkpoint_every": 1},
    "a callable": {"data": lambda number: batches(1, number)[0]},
    "an iterable": {"data": Loader()},
    "draws of the loss": {"loss": noisy_loss},
    "mappings": {"data": [{"x": batch} for batch in batches()]},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_it_goes_on_to_the_same_bits(kind: str, tmp_path: pathlib.Path) -> None:
    options = OPTIONS[kind]
    torch.manual_seed(1)
    wanted = tuned(**{k: v for k, v in options.items() if k != "checkpoint_every"})
    torch.manual_seed(1)
    stopped(tmp_path, 1, **options)
    torch.manual_seed(1)
    stopped(tmp_path, 5, **options)
    torch.manual_seed(2)  # another process knows nothing of the first one's seed
    stopped(tmp_path, 6, **options)
    assert same(tuned(tmp_path, **options), wanted)
    if kind in ("plain", "norms"):
        assert wanted[1].recoded > 0


def test_what_is_finished_comes_at_once(tmp_path: pathlib.Path) -> None:
    wanted = tuned(tmp_path)

    def never(*_: Any) -> Any:
        raise AssertionError

    dense, small = pair()
    dense.register_forward_pre_hook(never)
    again = tuned(tmp_path, model=(dense, small), progress=never)
    assert same(again, wanted) and again[1].seconds >= wanted[1].seconds
    assert all(type(m) is not RPQWeight or m.codebooks.requires_grad for m in small.modules())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pt", ".sha256"]


def test_an_iterator_is_given_anew(tmp_path: pathlib.Path) -> None:
    wanted = tuned(data=iter(batches(STEPS)))
    stopped(tmp_path, 4, data=iter(batches(STEPS)))
    assert same(tuned(tmp_path, data=iter(batches(STEPS))), wanted)
    stopped(tmp_path / "other", 4, data=iter(batches(STEPS)))
    with pytest.raises(FormatError, match="had come to batch 4, and data gives another one in its place"):
        tuned(tmp_path / "other", data=iter(batches(STEPS, seed=1)))
    with pytest.raises(FormatError, match="gives another one in its place"):
        tuned(tmp_path / "other", data=iter(batches(2)))


def test_the_cadence_may_change(tmp_path: pathlib.Path) -> None:
    wanted = tuned()
    stopped(tmp_path, 4)
    assert same(tuned(tmp_path, checkpoint_every=3), wanted)


def test_a_loss_that_is_not_finite_after_going_on_leaves_the_last_good_state(tmp_path: pathlib.Path) -> None:
    data = batches(STEPS)
    data[4] = data[4] * torch.nan

    def fed(number: int) -> Tensor:
        return data[number]

    models = [pair() for _ in range(2)]
    with pytest.raises(TrainingError, match="loss of step 4 is nan"):
        tuned(model=models[0], data=fed)
    stopped(tmp_path, 4, data=fed)
    with pytest.raises(TrainingError, match="loss of step 4 is nan"):
        tuned(tmp_path, model=models[1], data=fed)
    ours, theirs = (small.state_dict() for _, small in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _other(part: str) -> dict[str, Any]:
    dense, small = pair()
    if part == "teacher":
        dense.one.bias.data[0] += 1e-3
    if part == "codes":
        small.one.weight_rpq.codes[0, 0, 0] ^= 1
    if part == "buffer":
        small.norm.running_mean[0] += 1e-3
    changed = batches()
    changed[2][0, 0, 0] += 1e-3
    other: dict[str, dict[str, Any]] = {
        "batch": {"data": changed}, "fewer batches": {"data": batches(2)}, "steps": {"steps": STEPS + 1},
        "rates": {"rates": Rates()}, "train": {"train": lambda name: "one" in name}, "recode": {"recode": False},
        "loss": {"loss": noisy_loss}, "temperature": {"loss": Distillation(temperature=2.0)}, "seed": {"seed": 1},
        "clip": {"clip": 2.0}, "autocast": {"autocast": torch.bfloat16}, "norms": {"norms": "update"},
    }  # fmt: skip
    return {"model": (dense, small), **other.get(part, {})}


@pytest.mark.parametrize(
    "part",
    ["teacher", "codes", "buffer", "batch", "fewer batches", "steps", "rates", "train", "recode", "loss", "temperature",
     "seed", "clip", "autocast", "norms"],
)  # fmt: skip
def test_another_fine_tuning_is_refused_and_leaves_folder_and_model(part: str, tmp_path: pathlib.Path) -> None:
    stopped(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = _other(part)
    state = {name: tensor.clone() for name, tensor in options["model"][1].state_dict().items()}
    with pytest.raises(FormatError, match="a fine-tuning of another model, teacher, loss, setting or data"):
        tuned(tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert all(torch.equal(state[name], tensor) for name, tensor in options["model"][1].state_dict().items())


def test_options_that_mean_nothing_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="checkpoint_every is for a checkpoint"):
        tuned(checkpoint_every=2)
    for wrong in (0, 1.5, True):
        with pytest.raises(InputError, match="checkpoint_every is a whole number of steps from 1"):
            tuned(tmp_path / "none", checkpoint_every=wrong)
    assert not (tmp_path / "none").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match="not empty and holds no fine-tuning"):
        tuned(tmp_path)


@pytest.mark.parametrize("damage", ["half", "empty", "flipped", "removed"])
def test_a_damaged_state_counts_as_none(damage: str, tmp_path: pathlib.Path) -> None:
    wanted = tuned()
    stopped(tmp_path, 5)
    (path,) = tmp_path.glob("*.pt")
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    assert same(tuned(tmp_path), wanted)


def test_a_full_disk_keeps_the_last_state_and_the_model_of_the_last_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, save, count = tuned(), torch.save, [0]

    def full(held: Any, path: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            pathlib.Path(path).write_bytes(b"half a")
            raise OSError(28, "No space left on device")
        save(held, path)

    model = pair()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.torch, "save", full)
        with pytest.raises(OSError, match=r"could not be written .*No space left"):
            tuned(tmp_path, model=model)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pt", ".sha256"]
    assert bool(torch.isfinite(model[1](batches()[0])).all())
    assert same(tuned(tmp_path), wanted)


def test_drafts_that_a_killed_process_left_are_removed(tmp_path: pathlib.Path) -> None:
    left = [f"fine-tuning.sha256.{'0' * 8}.part", f"{'a' * 24}.pt.{'1' * 8}.part"]
    for name in left:
        (tmp_path / name).write_bytes(b"half a")
    tuned(tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
