"""What is typed: errors of one line, their exit status, and nothing imported that a command does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx.integrations.command_line.parser import FAILED, main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 16))
    path = tmp_path / "small.rpq"
    rpqfx.save(rpqfx.rpqify(model, rpqfx.Policy(codebook_dim=8, codebook_bits=4, min_size=64)), path)
    return path


def test_a_command_runs_as_a_module_without_optional_packages(file: Path) -> None:
    script = (
        "import sys\nfor name in ('transformers', 'safetensors', 'torchao'): sys.modules[name] = None\n"
        "from rpqfx.integrations.command_line.parser import main\n"
        f"sys.exit(main(['check', {str(file)!r}]) or main(['report', {str(file)!r}, '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{file} is whole") and len(json.loads(second)["sites"]) == 2


def test_an_error_is_one_line_and_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rpqfx", "check", str(tmp_path / "none.rpq")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == FAILED and not done.stdout
    assert done.stderr.splitlines() == [f"rpqfx check: {tmp_path / 'none.rpq'} does not exist"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "required: COMMAND"),
        (["melt"], "invalid choice: 'melt'"),
        (["report"], "required: PATH"),
        (["convert", "a", "--out", "b"], "required: --bits-per-weight"),
        (
            ["convert", "a", "--out", "b", "--bits-per-weight", "17"],
            "a number of bits above 0 and at most 16, got '17'",
        ),
        (
            ["convert", "a", "--out", "b", "--bits-per-weight", "nan"],
            "a number of bits above 0 and at most 16, got 'nan'",
        ),
        (["bench", "a", "--tokens", "0"], "a whole number from 1 on, got '0'"),
    ],
)
def test_what_is_typed_wrong_takes_one_line(typed: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed)
    line = capsys.readouterr().err
    assert ended.value.code == FAILED and said in line and line.count("\n") == 1


def test_an_interrupt_ends_without_a_traceback(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def interrupted(given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rpqfx.integrations.command_line.check.run", interrupted)
    assert main(["check", str(file)]) == 130
    assert capsys.readouterr().err == "rpqfx check: interrupted\n"
