"""Models of every kind that transformers has come back from their folders, to the last bit, in a fresh process.

They are those of the zoo, from tiny configurations: decoders, encoders, both, of images, of sound, with experts. All
are saved by one process and opened by one other; a test compares what each of them gave.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import rpqfx
from rpqfx import Policy
from tests.test_docs import ROOT
from tests.zoo_bench import models

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.slow

POLICY = Policy.from_scratch(codebook_dim=4, bits=5, min_size=512, allow_growth=True)
NAMES = (
    "llama", "gemma3_text", "qwen3", "phi3", "olmo2", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "ctrl", "mixtral",
    "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "jamba", "mamba", "falcon_mamba", "rwkv", "reformer", "xlnet",
    "bert", "albert", "distilbert", "deberta-v2", "funnel", "longformer", "modernbert", "esm", "luke", "perceiver",
    "bart", "m2m_100", "led", "t5", "switch_transformers", "vit", "dinov2", "hiera", "swin", "convnext", "resnet",
    "mobilevit", "segformer", "wav2vec2", "whisper", "encodec", "audio-spectrogram-transformer", "patchtst", "clip",
    "blip", "detr", "llava", "sam", "videomae",
)  # fmt: skip
_OPEN = """
import sys
import torch
import transformers
import rpqfx

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
found = {}
for folder in sys.argv[2:]:
    torch.manual_seed(1)
    call = torch.load(f"{folder}/call.pt", weights_only=False)
    try:
        model, info = getattr(transformers, call["kind"]).from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            out = model(*call["args"], **call["kwargs"])
        outputs = [one for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]
        found[folder] = ({name: sorted(told) for name, told in info.items() if told}, outputs)
    except Exception as error:
        found[folder] = ({"error": f"{type(error).__name__}: {error}"}, [])
torch.save(found, sys.argv[1])
"""


def flat(out: Any) -> list[torch.Tensor]:
    """The tensors of what a model returned."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


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
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each model what it gave here, and there."""
    folder = tmp_path_factory.mktemp("zoo")
    here: dict[str, Any] = {}
    transformers.logging.set_verbosity_error()
    for entry in models.catalogue(["transformers"]):
        name = entry.id.removeprefix("transformers/")
        if name not in NAMES:
            continue
        try:
            torch.manual_seed(0)
            small = rpqfx.rpqify(entry.build(), POLICY).eval()
            call = entry.call()
            torch.manual_seed(1)
            with torch.no_grad():
                wanted = flat(small(*call.args, **(call.kwargs or {})))
            small.save_pretrained(folder / name)
            values = {"args": call.args, "kwargs": call.kwargs or {}, "kind": auto_class(small)}
            torch.save(values, folder / name / "call.pt")
            here[name] = wanted
        except Exception as error:  # told by the model's own test
            here[name] = error
    paths = [str(folder / name) for name, wanted in here.items() if isinstance(wanted, list)]
    done = subprocess.run([sys.executable, "-c", _OPEN, str(folder / "found"), *paths], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found = torch.load(folder / "found", weights_only=False)
    return {name: (wanted, found.get(str(folder / name))) for name, wanted in here.items()}


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_to_the_last_bit(name: str, opened: dict[str, Any]) -> None:
    wanted, found = opened[name]
    if isinstance(wanted, Exception):
        raise wanted
    told, outputs = found
    assert told == {}
    assert len(outputs) == len(wanted) > 0
    for ours, other in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0, equal_nan=True)
