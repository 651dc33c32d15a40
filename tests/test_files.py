"""Claims on files that appear whole or not at all."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from rpqfx.files import draft, take_in


def digest(tensor: torch.Tensor, name: str = "") -> str:
    taken = hashlib.sha256()
    take_in(taken, tensor, name)
    return taken.hexdigest()


def test_what_was_written_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with draft(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_was_there_stays_if_anything_raises(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), draft(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_writer_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), draft(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_drafts_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with draft(tmp_path / "a") as one, draft(tmp_path / "a") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "a").read_text() == "1"


def test_sums_tell_names_dtypes_shapes_and_values_apart() -> None:
    zeros = torch.zeros(2, 3)
    others = [zeros.half(), zeros.int(), zeros.view(3, 2), zeros.index_put((torch.tensor(0),), torch.ones(3))]
    assert len({digest(tensor) for tensor in (zeros, *others)} | {digest(zeros, "b")}) == 6


def test_sums_are_of_values_and_not_of_strides() -> None:
    values = torch.arange(6.0).view(2, 3)
    assert digest(values) == digest(values.t().contiguous().t())
    assert digest(values.requires_grad_()) == digest(values.detach())
    assert digest(torch.empty(0, 3)) != digest(torch.empty(3, 0))
