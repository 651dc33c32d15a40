"""Claims on files that appear whole or not at all."""

import errno
import hashlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from rpqfx.storage.files import ENDING, draft, place, take_in
from tests import forks
from tests.figures import record


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


# ------------------------------------------------------------------------------------------------------- places


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "to nothing").symlink_to("not yet")
    assert place(tmp_path / "link") == place(str(tmp_path / "real")) == tmp_path / "real"
    assert place(os.fsencode(tmp_path / "to nothing")) == tmp_path / "not yet"


@pytest.mark.parametrize(
    ("name", "error", "why"),
    [
        ("folder", IsADirectoryError, "is a folder; give the name of a file in it"),
        ("none/a", FileNotFoundError, "there is no folder"),
        ("file/a", NotADirectoryError, "is no folder, so it cannot hold"),
        ("round", OSError, "is a symbolic link that leads to itself"),
        ("pipe", OSError, "is no regular file"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in folders there")
def test_what_no_file_can_be_written_to_says_so(name: str, error: type[OSError], why: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to("round")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=why) as raised:
        place(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o444, 0o664])
def test_a_file_keeps_its_mode_and_nobody_else_reads_its_draft(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(mode)
    with draft(path) as part:
        assert not part.stat().st_mode & 0o077 & ~mode
        with open(part, "w") as file:
            file.write("new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "new"


def test_names_as_long_as_a_file_system_takes_have_drafts(tmp_path: Path) -> None:
    for name in ("a" * 255, "é" * 127, "a.b\nc 'd\" $e"):
        with draft(tmp_path / name) as part:
            part.write_text("new")
            assert part.name.startswith(name[:20]) and part.name.endswith(ENDING)
        assert (tmp_path / name).read_text() == "new"


def test_what_was_written_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: done.append("replace") or replace(*a))
    with draft(tmp_path / "a") as part:
        part.write_text("new")
    assert done[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_last_is_named_and_the_old_file_stays(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="no space left") as raised, draft(tmp_path / "a") as part:
        part.write_text("new")
    assert raised.value.filename == str(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_file_systems_that_know_no_fsync_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "invalid argument")

    monkeypatch.setattr(os, "fsync", unknown)
    with draft(tmp_path / "a") as part:
        part.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


# ------------------------------------------------------------------------------------------------------- killed


def killed(folder: Path, suffix: str, times: int) -> dict[str, int]:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    done = forks.run(forks.module("tests.killing"), str(folder), suffix, str(times), "0")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["old"] + counts["new"] == times
    return counts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_a_save_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    killed(tmp_path, ".rpq", 8)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.parametrize("suffix", [".rpq", ".safetensors"])
def test_a_hundred_saves_that_are_killed(suffix: str, tmp_path: Path) -> None:
    counts = killed(tmp_path, suffix, 100)
    record(
        f"reliability/killed-save{suffix.replace('.', '-')}",
        "pytest -m slow tests/storage/test_files.py",
        attack=f"SIGKILL of a process that overwrites a `{suffix}` file",
        tried=100,
        outcome=f"{counts['old']} times the old file, {counts['new']} times the new one",
        counts=counts,
        seeds=[0],
    )
