"""Files are verified without a model: seal, ranges, checksum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx.integrations.command_line.parser import FAILED, main
from rpqfx.storage.container import open_container, writer_for
from rpqfx.storage.sealed_manifest import checksum, seal_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "small.rpq"
    small = rpqfx.rpqify(nn.Sequential(nn.Linear(64, 96)), rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=5))
    small[0].weight_rpq.codes.clamp_(max=10)
    rpqfx.save(small, path)
    return path


def test_a_whole_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(file)]) == 0 and "seal, ranges and checksum are right" in capsys.readouterr().out
    assert main(["check", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantized_weights"] == found["ranges_checked"] == 1 and found["bytes"] == file.stat().st_size


def test_a_byte_that_was_changed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(file.read_bytes())
    for at in range(0, len(raw), 97):
        bad = file.with_name("bad.rpq")
        bad.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        status, said = main(["check", str(bad)]), capsys.readouterr()
        assert status in (0, FAILED) and said.err.count("\n") == (status == FAILED)  # 0: nothing that is ever read


def test_a_code_out_of_range_under_a_right_seal(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(file, "rb") as opened:
        held = open_container(opened, file.name)
        tensors = held.read(list(held.stored))
    manifest = json.loads(held.text)
    site, name = manifest["sites"][0], "0.weight_rpq.codes"
    entry = next(entry for entry in manifest["tensors"] if entry["names"] == [name])
    site["spec"]["entries"] = entry["packed"]["entries"] = 9
    entry["packed"]["bits"] = 4
    books = next(entry for entry in manifest["tensors"] if entry["names"] == ["0.weight_rpq.codebooks"])
    books["shape"][2] = 9
    tensors["0.weight_rpq.codebooks"] = tensors["0.weight_rpq.codebooks"][:, :, :9].contiguous()
    tensors[name] = torch.full((-(-torch.Size(entry["shape"]).numel() // 2),), 0xAA, dtype=torch.uint8)
    manifest["records"], manifest["checksum"] = [], checksum(tensors)
    text = json.dumps(manifest)
    writer_for(file.name)(file, text, seal_of(text), tensors)
    assert main(["check", str(file)]) == FAILED
    assert "cannot be unpacked: codes of 10 to 10" in capsys.readouterr().err


def test_what_is_no_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("hello")
    for path, said in (("folder", "has no model.safetensors"), ("text", "no rpqfx file"), ("none", "does not exist")):
        assert main(["check", str(tmp_path / path)]) == FAILED
        assert said in capsys.readouterr().err
