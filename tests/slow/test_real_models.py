"""The claim on real models: pretrained ones, and transformers' architectures with random weights.

The pretrained ones need a folder with ``evalkit.py`` (``load_resnet_cifar``, ``cifar``, ``load_smollm2``), named by the
environment variable ``RPQFX_EVALKIT``; the others need transformers.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.reporting.report import dense_bytes
from tests.models import filled, quantized_weights

pytestmark = pytest.mark.slow
MATRICES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


@pytest.fixture(scope="module")
def kit() -> Any:
    folder = os.environ.get("RPQFX_EVALKIT")
    if not folder:
        pytest.skip("RPQFX_EVALKIT does not name a folder with evalkit.py")
    path = Path(folder) / "evalkit.py"
    if not path.exists():
        pytest.skip(f"RPQFX_EVALKIT is set, but {path} does not exist")
    spec = importlib.util.spec_from_file_location("evalkit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evalkit"] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        pytest.skip(f"the evaluation kit needs {error.name}")
    return module


def loaded(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (ImportError, OSError) as error:
        pytest.skip(f"the model is not there: {error}")


def assert_covered(model: nn.Module, small: nn.Module) -> None:
    """Every weight of a torch.nn layer is quantized, or in the report with a reason."""
    records = {name: record for record in rpqfx.report(small).sites for name in record.names}
    held = quantized_weights(small)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MATRICES) and module.weight.dim() > 1:
            record = records[f"{path}.weight"]
            assert (record.spec is not None) == (f"{path}.weight" in held)
            assert record.spec is not None or record.reason
    assert rpqfx.report(small).after == dense_bytes(small) < dense_bytes(model) == rpqfx.report(small).before


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


# -------------------------------------------------------------------------------------------------- pretrained models


def test_resnet20_is_rewritten_saved_and_loaded(kit: Any, tmp_path: Path):
    model = loaded(lambda: kit.load_resnet_cifar(20))
    small = rpqfx.rpqify(model, Policy(codebook_dim=9, codebook_bits=3, min_size=256))
    assert_covered(model, small)
    images, _ = kit.cifar("test", 64)
    dense = filled(model, small)
    with torch.no_grad():
        wanted = dense(images)
        assert_close(small(images), wanted)
        assert float((model(images) - wanted).abs().max()) > 0.1  # the fit does lose something
    for training in (dense, small):
        training.train()(images[:16]).logsumexp(1).sum().backward()
    ours = small.layer3[0].conv1.weight_rpq.codebooks.grad
    assert_close(ours.sum((0, 1, 2)), dense.layer3[0].conv1.weight.grad.reshape(-1, 9).sum(0), 1e-3)
    for name, buffer in dense.named_buffers():
        torch.testing.assert_close(small.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
    rpqfx.save(small.eval(), tmp_path / "resnet.rpq")
    again = rpqfx.load(tmp_path / "resnet.rpq", lambda: kit.CifarResNet(20)).eval()
    with torch.no_grad():
        assert torch.equal(again(images), small(images))


def test_resnet20_with_generous_codebooks_still_classifies(kit: Any):
    model = loaded(lambda: kit.load_resnet_cifar(20))
    small = rpqfx.rpqify(model, Policy(codebook_dim=3, codebook_bits=6, stages=2, min_size=256, allow_growth=True))
    images, labels = kit.cifar("test", 500)
    with torch.no_grad():
        right = [float((m(images).argmax(1) == labels).float().mean()) for m in (model, small)]
    assert right[0] > 0.88 and right[1] > right[0] - 0.05


def test_smollm2_is_rewritten_generates_and_comes_back(kit: Any, tmp_path: Path):
    model, tokenizer = loaded(kit.load_smollm2)
    ids = tokenizer("The weather today is", return_tensors="pt").input_ids
    blocks = model.model.layers
    model.model.layers = nn.ModuleList(blocks[:4])  # the rest only takes time
    model.config.num_hidden_layers = 4
    config = copy.deepcopy(model.config)
    original = dense_bytes(model)
    small = rpqfx.rpqify(model, Policy(codebook_dim=8, codebook_bits=4))
    assert_covered(model, small)
    assert type(small) is type(model) and rpqfx.report(small).after < 0.4 * original
    assert small.lm_head.weight_rpq is small.model.embed_tokens.weight_rpq
    dense = filled(model, small)
    with torch.no_grad():
        assert_close(small(ids).logits, dense(ids).logits, 1e-3)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(ids, **settings), dense.generate(ids, **settings))
    rpqfx.save(small, tmp_path / "smollm2.rpq")
    again = rpqfx.load(tmp_path / "smollm2.rpq", lambda: type(model)(config)).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)
    assert (tmp_path / "smollm2.rpq").stat().st_size < 0.4 * original


# ------------------------------------------------------------------------------------- transformers' architectures

TINY = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
LANGUAGE = {
    "OPT": ({**TINY, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}, "OPTForCausalLM"),
    "GPT2": ({"vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64}, "GPT2LMHeadModel"),
    "Llama": ({**TINY, "intermediate_size": 128, "num_key_value_heads": 2}, "LlamaForCausalLM"),
}
POLICY = Policy(codebook_dim=8, codebook_bits=4, min_size=1024)


def build(name: str, values: dict[str, Any], architecture: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, 1)
    return getattr(transformers, architecture)(config).eval()


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_compute_the_same_and_generate(name: str):
    model = build(name, *LANGUAGE[name])
    small = rpqfx.rpqify(model, POLICY)
    assert_covered(model, small)
    dense = filled(model, small)
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        assert_close(small(ids, attention_mask=mask).logits, dense(ids, attention_mask=mask).logits)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    found = small.generate(ids, **settings)
    assert found.shape == (2, 18) and torch.equal(found, dense.generate(ids, **settings))
    small.train()
    loss = small(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if p.requires_grad and "position" not in n)


def test_gpt2s_conv1d_is_held_along_its_outputs():
    small = rpqfx.rpqify(build("GPT2", *LANGUAGE["GPT2"]), POLICY)
    records = {record.name: record for record in rpqfx.report(small).rewritten}
    assert records["transformer.h.0.attn.c_attn.weight"].kind == "linear"
    assert records["transformer.h.0.mlp.c_proj.weight"].kind == "linear"


ENCODERS = {
    "Bert": ({**TINY, "intermediate_size": 128}, "BertModel", "ids"),
    "T5": (
        {"vocab_size": 300, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        "T5ForConditionalGeneration",
        "both",
    ),
    "ViT": (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
         "image_size": 32, "patch_size": 8},
        "ViTModel",
        "image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_compute_the_same(name: str):
    values, architecture, takes = ENCODERS[name]
    model = build(name, values, architecture)
    small = rpqfx.rpqify(model, POLICY)
    assert_covered(model, small)
    dense = filled(model, small)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 300, (2, 12), generator=g)
    inputs = {
        "ids": {"input_ids": ids},
        "both": {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32, generator=g)},
    }[takes]
    with torch.no_grad():
        found, wanted = small(**inputs), dense(**inputs)
    assert_close(found[0], wanted[0])
    if takes == "both":
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(small.generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize("name", [*LANGUAGE, *ENCODERS])
def test_transformers_models_are_saved_and_loaded(name: str, tmp_path: Path):
    values, architecture = (LANGUAGE.get(name) or ENCODERS[name])[:2]
    model = build(name, values, architecture)
    small = rpqfx.rpqify(model, POLICY)
    rpqfx.save(small, tmp_path / "m.rpq")
    again = rpqfx.load(tmp_path / "m.rpq", lambda: type(model)(copy.deepcopy(model.config)))
    ours, theirs = again.state_dict(), small.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[n]) for n, value in ours.items())


@pytest.mark.parametrize("name", ["OPT", "Llama", "Bert"])
def test_transformers_models_on_the_meta_device_are_materialised(name: str):
    values, architecture = (LANGUAGE.get(name) or ENCODERS[name])[:2]
    with torch.device("meta"):
        model = build(name, values, architecture)
    small = rpqfx.materialize(rpqfx.rpqify(model, Policy.from_scratch(codebook_dim=16, codebook_bits=4, min_size=1024)))
    assert not any(t.is_meta for t in (*small.parameters(), *small.buffers()))
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
