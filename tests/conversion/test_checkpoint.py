"""Checkpoints: an interrupted conversion goes on, to the same result; nothing that is wrong is taken on."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.conversion import checkpoint, conversion
from rpqfx.conversion.checkpoint import Checkpoint, fingerprint
from rpqfx.errors import FormatError, InputError
from rpqfx.graph import is_rewritten
from tests.conversion.test_conversion import convnet as build
from tests.conversion.test_conversion import equal, images, inputs, mlp
from tests.models import quantized_weights

POLICY = Policy.pretrained(bits_per_weight=3, min_size=256)
WEIGHTS = 4


def converted(folder: Any, model: nn.Module | None = None, **options: Any) -> nn.Module:
    given = {"policy": POLICY, "calibration": images(0), "checkpoint": folder, **options}
    return rpqfx.convert(model or build(), **given)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that are fitted, as they are; codebooks that are trained count as ``()``."""
    shapes: list[tuple[int, ...]] = []
    fit, train = conversion.fit_weight, conversion.train_codebooks
    monkeypatch.setattr(conversion, "fit_weight", lambda v, *a, **k: shapes.append(tuple(v.shape)) or fit(v, *a, **k))
    monkeypatch.setattr(conversion, "train_codebooks", lambda *a, **k: shapes.append(()) or train(*a, **k))
    return shapes


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("done", range(1, WEIGHTS))
def test_an_interrupted_conversion_goes_on_to_the_same_result(
    done: int, tmp_path: pathlib.Path, fits: list[Any]
) -> None:
    def stop(at: int, total: int, name: str) -> None:
        if total == WEIGHTS and at == done:
            raise KeyboardInterrupt

    wanted = converted(None)
    fits.clear()
    with pytest.raises(KeyboardInterrupt):
        converted(tmp_path, progress=stop)
    first = [shape for shape in fits if shape]
    assert len(first) == done
    fits.clear()
    assert equal(converted(tmp_path), wanted)
    assert len(fits) == WEIGHTS - done and not set(fits) & {()}
    fits.clear()
    assert equal(converted(tmp_path), wanted) and not fits
    assert [r.error for r in rpqfx.report(converted(tmp_path)).sites] == [r.error for r in rpqfx.report(wanted).sites]


def test_without_calibration_too(tmp_path: pathlib.Path, fits: list[Any]) -> None:
    wanted = converted(None, calibration=None)
    assert equal(converted(tmp_path, calibration=None), wanted)
    fits.clear()
    assert equal(converted(tmp_path, calibration=None), wanted) and not fits


def test_weights_with_signs_and_factors_are_kept_too(tmp_path: pathlib.Path, fits: list[Any]) -> None:
    policy = Policy(codebook_dim=4, codebook_bits=3, min_size=256, signs=True, scale=True, column_scale=True)
    wanted = converted(tmp_path, policy=policy)
    assert [1 for weight in quantized_weights(wanted).values() if weight.signs is not None and weight.signs.any()]
    fits.clear()
    assert equal(converted(tmp_path, policy=policy), wanted) and not fits


def test_a_checkpoint_is_for_conversions() -> None:
    with pytest.raises(InputError, match=r"got none; give calibration batches, or a policy with a rate .*, or call"):
        rpqfx.convert(mlp(), Policy(codebook_bits=4, codebook_dim=4), None, checkpoint="nowhere")
    assert not os.path.exists("nowhere")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the checkpoint of a conversion."""
    folder = tmp_path_factory.mktemp("finished")
    converted(folder)
    return folder


def _other(part: str) -> dict[str, Any]:
    model, batches = build(), images(0)
    if part == "weight":
        model.conv.weight.data[0, 0, 0, 0] += 1e-3
    if part == "bias":
        model.conv.bias.data[0] += 1e-3
    if part == "buffer":
        model.norm1.running_mean[0] += 1e-3
    if part == "batch":
        batches[1][0, 0, 0, 0] += 1e-3
    return {
        "policy": {"policy": Policy.pretrained(bits_per_weight=3.5, min_size=256)},
        "seed": {"seed": 1},
        "fewer batches": {"calibration": batches[:2]},
        "no batches": {"calibration": None},
    }.get(part, {"model": model, "calibration": batches})


@pytest.mark.parametrize("part", ["weight", "bias", "buffer", "batch", "policy", "seed", "fewer batches", "no batches"])
def test_another_conversion_is_refused_and_leaves_the_folder(part: str, finished: pathlib.Path) -> None:
    before = files(finished)
    with pytest.raises(FormatError, match="holds a conversion of another model, policy, seed or calibration"):
        converted(finished, **_other(part))
    assert files(finished) == before


def test_plain_values_in_batches_are_part_of_the_conversion(tmp_path: pathlib.Path) -> None:
    class Moded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor, mode: str = "a") -> Tensor:
            return self.out(torch.tanh(self.fc(x)) if mode == "a" else self.fc(x))

    def run(mode: str) -> nn.Module:
        torch.manual_seed(0)
        batches = [{"x": x, "mode": mode} for x in inputs(0, 8, 32)]
        return rpqfx.convert(Moded(), POLICY, batches, checkpoint=tmp_path)

    run("a")
    run("a")
    with pytest.raises(FormatError, match="of another model"):
        run("b")


def test_a_folder_of_something_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match="not empty and holds no conversion; give an empty folder"):
        converted(tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}
    with pytest.raises(OSError):
        converted(tmp_path / "thesis.tex")


@pytest.mark.parametrize("damage", ["truncated", "empty", "a flipped bit", "removed", "another thing"])
def test_a_damaged_file_counts_as_none(damage: str, tmp_path: pathlib.Path, fits: list[Any]) -> None:
    wanted = converted(tmp_path)
    path = Checkpoint(tmp_path, (tmp_path / "conversion.sha256").read_text())._path("conv.weight")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "removed":
        path.unlink()
    elif damage == "another thing":
        torch.save([1, 2], path)
    else:
        codes = bytes(wanted.conv.weight_rpq.codes.numpy().tobytes()[:32])
        at = bytes(content).find(codes)
        assert at > 0
        content[at] ^= 1
        path.write_bytes(content)
    fits.clear()
    assert equal(converted(tmp_path), wanted)
    assert fits == [(32, 144)]
    fits.clear()
    assert equal(converted(tmp_path), wanted) and not fits


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_full_disk_says_so_and_loses_nothing(
    at: int, kind: type[Exception], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, model = converted(None), build()
    save, count = torch.save, [0]

    def full(held: Any, path: Any) -> None:
        count[0] += 1
        if count[0] == at:
            pathlib.Path(path).write_bytes(b"half a")
            raise kind("No space left on device")
        save(held, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\); what was saved stays"):
            converted(tmp_path, model, inplace=True)
    assert not is_rewritten(model) and equal(model, build())
    assert len(files(tmp_path)) == at and not list(tmp_path.glob("*.part"))
    before = files(tmp_path)
    assert equal(converted(tmp_path, model, inplace=True), wanted)
    assert before.items() <= files(tmp_path).items()


def test_names_of_any_length_and_signs_are_kept(tmp_path: pathlib.Path) -> None:
    store = Checkpoint(tmp_path / "new" / "folder", "x")
    names = ["a/b", "..", "é" * 500, "A", "a"]
    for number, name in enumerate(names):
        store.save(name, {"n": torch.tensor(number), "empty": torch.empty(0, 3)})
    again, shapes = Checkpoint(tmp_path / "new" / "folder", "x"), {"n": (), "empty": (0, 3)}
    assert [int(again.load(name, shapes)["n"]) for name in names] == list(range(5))
    assert again.load("other", shapes) is None
    for wrong in ({"n": ()}, {"n": (1,), "empty": (0, 3)}, {"n": (), "empty": (0, 3), "more": ()}):
        assert again.load("a", wrong) is None


def test_a_folder_of_one_that_was_killed_at_once_is_as_good_as_empty(tmp_path: pathlib.Path) -> None:
    (tmp_path / "conversion.sha256.0123abcd.part").write_text("")
    Checkpoint(tmp_path, "x").save("a", {"n": torch.tensor(1)})
    assert int(Checkpoint(tmp_path, "x").load("a", {"n": ()})["n"]) == 1


def test_a_file_of_other_shapes_under_a_sum_that_fits_counts_as_none(tmp_path: pathlib.Path, fits: list[Any]) -> None:
    wanted = converted(tmp_path)
    store = Checkpoint(tmp_path, (tmp_path / "conversion.sha256").read_text())
    spec = wanted.conv.weight_rpq.spec
    far = torch.full(spec.codes_shape, spec.entries, dtype=torch.int64).to(spec.code_dtype)
    for tensors in ({"codes": torch.zeros(3)}, {"codes": far, "error": torch.tensor(0.0)}, {}):
        store.save("conv.weight", tensors)
        fits.clear()
        assert equal(converted(tmp_path), wanted) and fits == [(32, 144)]


def test_fingerprints_tell_values_dtypes_shapes_and_order_apart() -> None:
    x = torch.arange(6.0)
    parts: list[Any] = [
        (["a"], [x]), (["b"], [x]), (["a", ""], [x]), (["a"], [x.view(2, 3)]), (["a"], [x.double()]), (["a"], [x, x]),
        (["a"], [-x]), ([], [x]), (["a"], [x.view(2, 3).t()]), (["a"], [x.view(torch.int32)]),
        (["a"], [torch.empty(0)]),
    ]  # fmt: skip
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint(["a"], [x]) == fingerprint(["a"], [nn.Parameter(x.clone())])
    assert fingerprint([], [x.bfloat16()]) != fingerprint([], [x.half()])
