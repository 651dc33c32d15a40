"""The report of a file, as text, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx.integrations.command_line.parser import FAILED, main


def test_all_its_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4))
    small = rpqfx.rpqify(model, rpqfx.Policy(codebook_dim=8, codebook_bits=4, min_size=1024))
    path, page = str(tmp_path / "small.rpq"), tmp_path / "page.html"
    rpqfx.save(small, path)
    assert main(["report", path, "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{rpqfx.report(small)}\n"
    assert page.read_text(encoding="utf-8") == rpqfx.report(small).to_html()
    assert main(["report", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(rpqfx.report(small).to_dict()))


def test_a_page_that_cannot_be_written_is_refused_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none.rpq"), "--html", str(tmp_path / "no" / "page.html")]) == FAILED
    assert "there is no folder" in capsys.readouterr().err
