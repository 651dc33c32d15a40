"""A reader of torch's files that runs nothing, trusts no size, and reads what torch reads."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpqfx.errors import FormatError
from rpqfx.storage.archive import Archive, is_dense
from rpqfx.storage.pickle_reader import DTYPES


def written(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def opened(content: bytes) -> Archive:
    return Archive(io.BytesIO(content))


def zipped(pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """A file as torch writes it, of a pickle and storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in (records or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return file.getvalue()


class Persistent(pickle.Pickler):
    """Writes storages as torch does, with whatever numbers."""

    def persistent_id(self, value: Any) -> Any:
        return value.said if isinstance(value, Storage) else None


class Storage:
    def __init__(self, kind: Any, count: Any, key: str = "0") -> None:
        self.said = ("storage", kind, key, "cpu", count)


class Rebuilt:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def of_tensor(*arguments: Any) -> bytes:
    file = io.BytesIO()
    Persistent(file, 2).dump({"x": Rebuilt(*arguments)})
    return file.getvalue()


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(sorted(DTYPES)), axes=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_it_reads_what_torch_reads(seed: int, dtype: str, axes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [int(n) for n in torch.randint(0, 4, (axes,), generator=generator)]
    order = torch.randperm(axes, generator=generator).tolist()
    numbers = torch.randint(0, 2, shape, generator=generator).to(DTYPES[dtype]).permute(order)
    content = written({"text": "é", "nested": {"x": numbers, "same": numbers}})
    archive = opened(content)
    value = archive.value()
    assert value["text"] == "é"
    found = archive.tensors(value["nested"])
    wanted = torch.load(io.BytesIO(content), weights_only=True)["nested"]["x"]
    raw = found["x"].contiguous().reshape(-1).view(torch.uint8).tolist() if numbers.numel() else []
    assert raw == (wanted.contiguous().reshape(-1).view(torch.uint8).tolist() if numbers.numel() else [])
    assert found["x"].dtype == wanted.dtype and found["x"].shape == wanted.shape
    assert found["x"].stride() == wanted.stride()
    assert found["x"].untyped_storage().data_ptr() == found["same"].untyped_storage().data_ptr()


def test_parts_of_a_storage_share_it() -> None:
    whole = torch.arange(6.0)
    archive = opened(written({"a": whole[:2], "b": whole[2:]}))
    found = archive.tensors(archive.value())
    found["a"].as_strided((6,), (1,))[2] = 9
    assert found["b"].tolist() == [9.0, 3.0, 4.0, 5.0] and found["a"].tolist() == [0.0, 1.0]


CLAIMS: dict[str, tuple[Any, ...]] = {
    "a storage longer than its record": (Storage(torch.FloatStorage, 10**12), 0, (2,), (1,), False, {}),
    "a storage of no record": (Storage(torch.FloatStorage, 2, "1"), 0, (2,), (1,), False, {}),
    "a shape beyond the storage": (Storage(torch.FloatStorage, 2), 0, (10**12,), (1,), False, {}),
    "one element seen 10^12 times": (Storage(torch.FloatStorage, 2), 0, (10**12,), (0,), False, {}),
    "an offset beyond the storage": (Storage(torch.FloatStorage, 2), 1, (2,), (1,), False, {}),
    "a negative offset": (Storage(torch.FloatStorage, 2), -1, (2,), (1,), False, {}),
    "a shape of nothing that is too large": (
        Storage(torch.FloatStorage, 2),
        0,
        (0, 2**62, 2**62),
        (1, 1, 1),
        False,
        {},
    ),
    "a shape of text": (Storage(torch.FloatStorage, 2), 0, ("2",), (1,), False, {}),
    "fewer strides than axes": (Storage(torch.FloatStorage, 2), 0, (1, 2), (1,), False, {}),
    "a count of flags": (Storage(torch.FloatStorage, True), 0, (2,), (1,), False, {}),
    "a storage of another kind": (Storage(dict, 2), 0, (2,), (1,), False, {}),
    "hooks": (Storage(torch.FloatStorage, 2), 0, (2,), (1,), False, {"x": 1}),
    "no storage": (1, 0, (2,), (1,), False, {}),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_pickle_claims_is_held_against_the_bytes(name: str) -> None:
    two = struct.pack("<2f", 1, 2)
    fair = opened(zipped(of_tensor(Storage(torch.FloatStorage, 2), 0, (2,), (1,), False, {}), {"0": two}))
    assert fair.tensors(fair.value())["x"].tolist() == [1, 2]
    with pytest.raises(FormatError):
        opened(zipped(of_tensor(*CLAIMS[name]), {"0": two})).value()


class Runs:
    ran = False

    def __reduce__(self) -> Any:
        return _run, ()


def _run() -> None:
    Runs.ran = True


def test_nothing_is_run_or_looked_up() -> None:
    content = zipped(pickle.dumps({"x": Runs()}, 2))
    pickle.loads(pickle.dumps(Runs(), 2))
    assert Runs.ran  # the check can fail
    Runs.ran = False
    for pickled in (content, zipped(pickle.dumps([1])), zipped(pickle.dumps(bytearray(3), 5)), zipped(b"", {})):
        with pytest.raises(FormatError, match="does not say what it holds"):
            opened(pickled).value()
    assert not Runs.ran


def deep() -> bytes:
    return b"\x80\x02" + b"(" * 100_000 + b"."


@pytest.mark.parametrize(
    "pickled",
    [deep(), b"\x80\x02.", b"\x80\x02}", b"\x80\x02}}.", b"\x80\x02}K\x01K\x01s.", b"\x80\x02h\x07.", b"\x80\x02t.",
     b"\x80\x02s.", b"\x80\x02Q.", b"\x80\x02K\x01Q.", b"\x80\x02R.", b"\xff", b"\x80\x02}r\xff\xff\xff\xff\x85."],
)  # fmt: skip
def test_pickles_that_make_no_sense_are_refused_or_harmless(pickled: bytes) -> None:
    with contextlib.suppress(FormatError):
        opened(zipped(pickled)).value()


def doubled(content: bytes) -> bytes:
    """An archive whose directory names a record twice."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"")
    return file.getvalue()


CONTAINERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "compressed": (lambda _: zipped(b"0" * 10**6, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a record twice": (doubled, "there twice"),
    "cut": (lambda content: content[:-30], "no zip archive"),
    "not one of torch": (lambda _: _other(), "not one of torch"),
    "of another order of bytes": (lambda content: content.replace(b"little", b"bigger"), "another order of bytes"),
}


def _other() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello", "hello")
    return file.getvalue()


@pytest.mark.parametrize("name", CONTAINERS)
def test_archives_that_torch_does_not_write_are_refused(name: str) -> None:
    damage, why = CONTAINERS[name]
    with pytest.raises(FormatError, match=why):
        opened(damage(zipped(pickle.dumps({}, 2)))).value()


def test_records_that_overlap_are_refused() -> None:
    """Many records that are the same bytes would take many times the file's length."""
    content = zipped(pickle.dumps({}, 2), {"0": b"a" * 100, "1": b"b" * 100})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        first, second = (archive.getinfo(f"archive/data/{key}") for key in "01")
    end = content.rindex(b"archive/data/1") - 4  # of the entry in the directory: where its record begins
    assert content[end : end + 4] == struct.pack("<I", second.header_offset)
    changed = content[:end] + struct.pack("<I", first.header_offset) + content[end + 4 :]
    with pytest.raises(FormatError, match="overlap"):
        opened(changed)


@given(seed=st.integers(0, 2**32))
def test_dense_tensors_are_those_whose_elements_fill_their_memory(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(1, 4, (3,), generator=generator).tolist()
    order = torch.randperm(3, generator=generator).tolist()
    tensor: Tensor = torch.empty(shape).permute(order)
    assert is_dense(tensor.shape, tensor.stride())
    wide = torch.empty(4, 3, 3)[::2]
    assert not is_dense(wide.shape, wide.stride()) and not is_dense((2,), (0,)) and is_dense((0, 5), (0, 9))
