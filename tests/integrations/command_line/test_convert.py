"""From a dense folder to text, by commands alone; on a tiny model that is made here."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rpqfx
from rpqfx import Policy
from rpqfx.integrations.command_line import texts
from rpqfx.integrations.command_line.parser import FAILED, main

transformers = pytest.importorskip("transformers", minversion="5.0")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

WORDS = [f"w{number}" for number in range(60)]
OPTIONS = ["--length", "32", "--batches", "3", "--quiet"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    ids = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(ids), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text(dense: Path) -> Path:
    drawn = random.Random(0).choices(WORDS, k=400)
    path = dense.parent / "text.txt"
    path.write_text(" ".join(drawn), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(dense: Path, text: Path) -> Path:
    """Converted by a process of its own, as a person does."""
    out = dense.parent / "small"
    command = [
        sys.executable,
        "-m",
        "rpqfx",
        "convert",
        str(dense),
        "--bits-per-weight",
        "5",
        "--calibration",
        str(text),
    ]
    done = subprocess.run([*command, "--out", str(out), *OPTIONS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and "tokens that were held back" in done.stdout
    assert f"to run it: rpqfx generate {out} --prompt" in done.stdout
    return out


def test_it_is_what_the_library_makes(dense: Path, text: Path, small: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    tokens = texts.tokens_of(transformers.AutoTokenizer.from_pretrained(dense), text.read_text(encoding="utf-8"))
    calibration, held = texts.split(tokens, 8192)
    assert len(held) == len(tokens) // 5
    wanted = rpqfx.convert(model, Policy.pretrained(5), texts.windows(calibration, 32, 3))
    found = transformers.AutoModelForCausalLM.from_pretrained(small)
    ids = tokens[None, :16]
    assert torch.equal(found(ids).logits, wanted(ids).logits)
    assert "license: mit" in (small / "README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in small.parent.iterdir()) == ["dense", "small", "text.txt"]


def test_what_was_converted_is_whole_and_generates(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(small)]) == 0
    assert main(["report", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[1])["bits_per_weight"] > 0
    assert main(["generate", str(small), "--prompt", "w1 w2", "--tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"].startswith("w1 w2") and 1 <= found["new_tokens"] <= 4


@pytest.mark.slow  # a process more
def test_speed_and_memory_are_measured_beside_the_dense_model(
    dense: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    options = ["--dense", str(dense), "--tokens", "3", "--prompt-tokens", "8", "--json"]
    assert main(["bench", str(small), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensor_bytes"] < found["dense"]["tensor_bytes"] and found["tokens_per_second"] > 0


def test_weights_alone_and_json_lines(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": " ".join(WORDS[i:])}) for i in range(4)), encoding="utf-8")
    out = ["--bits-per-weight", "5", "--out", str(tmp_path / "out"), "--quiet", "--json"]
    assert main(["convert", str(dense), *out, "--held-back", str(lines)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] > 1 and found["bytes"] < found["bytes_before"]


def test_what_was_interrupted_goes_on(
    dense: Path, text: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from rpqfx.conversion.checkpoint import Checkpoint

    save, saved = Checkpoint.save, []

    def counted(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(name)
        return save(self, name, *args, **kwargs)

    out = tmp_path / "out"
    typed = ["convert", str(dense), "--bits-per-weight", "5", "--calibration", str(text), "--out", str(out), *OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", counted)
        assert main(typed) == 130
    assert not out.exists() and os.listdir(tmp_path) == ["out.partial"]
    monkeypatch.setattr(Checkpoint, "save", lambda self, name, *rest, **more: saved.append(f"again {name}"))
    assert main(typed) == 0
    assert saved[3:] and {name.removeprefix("again ") for name in saved[3:]}.isdisjoint(saved[:3])
    ours, theirs = (safetensors.load_file(folder / "model.safetensors") for folder in (out, small))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batches", "3"], "--batches would change nothing"),
        (["--length", "3"], "--length would change nothing"),
        (["--evaluate", "3"], "--evaluate would change nothing"),
        (["--calibration", "TEXT", "--length", "64"], None),
        (["--calibration", "none.txt"], "none.txt"),
        (["--calibration", "EMPTY"], "holds no text"),
        (["--calibration", "FEW"], "has 2 tokens, and a batch takes 64"),
        (["--calibration", "BROKEN"], "line 2: no JSON"),
        (["--calibration", "IMAGES", "--held-back", "TEXT"], "--held-back would change nothing"),
    ],
)
def test_what_cannot_be_done_is_refused_before(
    options: list[str], said: str | None, dense: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = {"EMPTY": " \n", "FEW": "w1 w2", "BROKEN": '"w1"\n{'}
    for name, content in made.items():
        (tmp_path / f"{name}.jsonl" if name == "BROKEN" else tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "IMAGES").mkdir()
    paths = {"TEXT": str(text), "BROKEN": str(tmp_path / "BROKEN.jsonl"), "IMAGES": str(tmp_path / "IMAGES")}
    paths |= {name: str(tmp_path / name) for name in ("EMPTY", "FEW")}

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise ValueError("the work began")

    monkeypatch.setattr("rpqfx.integrations.command_line.convert.convert", stopped)
    typed = [paths.get(option, option) for option in options]
    assert main(["convert", str(dense), "--bits-per-weight", "5", "--out", str(tmp_path / "out"), *typed]) == FAILED
    assert (said or "the work began") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(dense), "--bits-per-weight", "5", "--out", str(dense)]) == FAILED
    assert "is there already" in capsys.readouterr().err


def test_folders_that_hold_no_model(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"architectures": ["Unheard"]}')
    for folder, said in (("none", "does not exist"), ("odd", "names the class Unheard, which transformers")):
        assert (
            main(["convert", str(tmp_path / folder), "--bits-per-weight", "5", "--out", str(tmp_path / "out")])
            == FAILED
        )
        assert said in capsys.readouterr().err
