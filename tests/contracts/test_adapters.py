"""peft's adapters train on a rewritten model as they do on the dense one that holds the same weights.

A few of each kind are tried here; ``tests/slow/test_adapters.py`` has the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import RPQError
from tests.models import filled

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

IDS = torch.arange(2, 26).view(2, 12)
POLICY = Policy.from_scratch(codebook_dim=8, codebook_bits=5)
LAYERS = ["q_proj", "down_proj"]


def build() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def pair() -> tuple[nn.Module, nn.Module]:
    """A rewritten model, and the dense model that holds the same weights."""
    dense = build()
    small = rpqfx.rpqify(dense, POLICY)
    return small, filled(dense, small)


def adapted(model: nn.Module, config: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config)


def losses(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(2)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def check_trains_and_saves(config: Callable[[], Any], folder: Path) -> None:
    """Same losses as on the dense model; saved and loaded onto the same weights it computes the same."""
    small, dense = pair()
    model, twin = adapted(small, config()), adapted(dense, config())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in twin.named_parameters() if p.requires_grad]
    assert not any("_rpq" in name for name in trained)
    torch.testing.assert_close(torch.tensor(losses(model)), torch.tensor(losses(twin)), rtol=2e-4, atol=1e-4)
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(small), folder)
    torch.testing.assert_close(logits(again), logits(model))
    assert not torch.equal(logits(model)[:, -12:], logits(small))  # prompts come before the tokens


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM"),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_train_as_on_the_dense_model(name: str, tmp_path: Path):
    check_trains_and_saves(CONFIGS[name], tmp_path)


def test_what_cannot_be_merged_says_what_to_do_and_changes_nothing():
    small, _ = pair()
    model = adapted(small, CONFIGS["lora"]())
    losses(model)
    before = logits(model)
    with pytest.raises(RPQError, match="do not merge it"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), logits(small))


def test_adapters_are_merged_into_weights_that_are_dense_again():
    small, _ = pair()
    model = adapted(small, CONFIGS["lora"]())
    losses(model)
    wanted = logits(model)
    merged = rpqfx.dequantize(model, inplace=True).merge_and_unload()
    assert type(merged) is transformers.LlamaForCausalLM
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert merged.state_dict().keys() == build().state_dict().keys()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_again_is_saved_and_loaded_as_any_other(tied: bool, tmp_path: Path):
    config = build().config
    config.tie_word_embeddings = tied
    dense = transformers.LlamaForCausalLM(config)
    again = rpqfx.dequantize(rpqfx.rpqify(dense, Policy.pretrained(5.0, min_size=256)))
    assert again.all_tied_weights_keys == dense.all_tied_weights_keys
    assert again._tied_weights_keys == dense._tied_weights_keys
    again.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(again))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    again.resize_token_embeddings(310)
    assert logits(again).shape[-1] == 310
