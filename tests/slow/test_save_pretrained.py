"""Models of every kind that transformers has come back from their folders, to the last bit, in a fresh process.

They are those of the zoo, from tiny configurations: decoders, encoders, both, of images, of sound, with experts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rpqfx
from rpqfx import Policy
from tests.test_docs import ROOT
from tests.zoo_bench import models

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.slow

POLICY = Policy.from_scratch(codebook_dim=4, codebook_bits=5, min_size=512, allow_growth=True)
NAMES = (
    "llama", "gemma3_text", "qwen3", "phi3", "olmo2", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "ctrl", "mixtral",
    "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "jamba", "mamba", "falcon_mamba", "rwkv", "reformer", "xlnet",
    "bert", "albert", "distilbert", "deberta-v2", "funnel", "longformer", "modernbert", "esm", "luke", "perceiver",
    "bart", "m2m_100", "led", "t5", "switch_transformers", "vit", "dinov2", "hiera", "swin", "convnext", "resnet",
    "mobilevit", "segformer", "wav2vec2", "whisper", "encodec", "audio-spectrogram-transformer", "patchtst", "clip",
    "blip", "detr", "llava", "sam", "videomae",
)  # fmt: skip
BY_NAME = {entry.id.removeprefix("transformers/"): entry for entry in models.catalogue(["transformers"])}
_OPEN = """
import sys
import torch
import transformers
import rpqfx

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
for folder in map(str.rstrip, sys.stdin):
    call = torch.load(f"{folder}/call.pt", weights_only=False)
    try:
        model, info = getattr(transformers, call["kind"]).from_pretrained(folder, output_loading_info=True)
        torch.manual_seed(1)
        with torch.no_grad():
            out = model(*call["args"], **call["kwargs"])
        outputs = [one for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]
        found = {name: sorted(told) for name, told in info.items() if told}, outputs
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}, []
    torch.save(found, f"{folder}/found.pt")
    print("done", flush=True)
"""


def auto_class(model: Any) -> str:
    """The Auto class that opens a model's folder; its own where there is none."""
    own = getattr(type(model), "_rpq_base", type(model))
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(model.config) in mapping:
            kinds = mapping[type(model.config)]
            if own in (kinds if isinstance(kinds, (list, tuple)) else (kinds,)):
                return name
    return own.__name__


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[subprocess.Popen[str]]:
    """A process that opens folders and runs what is in them; it never saw the models."""
    command = [sys.executable, "-c", _OPEN]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_to_the_last_bit(name: str, elsewhere: subprocess.Popen[str], tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    small = rpqfx.rpqify(BY_NAME[name].build(), POLICY).eval()
    call = BY_NAME[name].call()
    torch.manual_seed(1)  # some draw numbers in a forward
    with torch.no_grad():
        out = small(*call.args, **(call.kwargs or {}))
    wanted = [one for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]
    small.save_pretrained(tmp_path)
    torch.save({"args": call.args, "kwargs": call.kwargs or {}, "kind": auto_class(small)}, tmp_path / "call.pt")
    assert elsewhere.stdin is not None and elsewhere.stdout is not None
    print(tmp_path, file=elsewhere.stdin, flush=True)
    assert elsewhere.stdout.readline() == "done\n"
    told, outputs = torch.load(tmp_path / "found.pt", weights_only=False)
    assert told == {}
    assert len(outputs) == len(wanted) > 0
    for ours, other in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0, equal_nan=True)
