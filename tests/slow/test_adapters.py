"""Every kind of adapter that peft has, on rewritten models (see ``tests/contracts/test_adapters.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rpqfx.errors import RPQError
from tests.contracts.test_adapters import (
    IDS,
    LAYERS,
    adapted,
    check_trains_and_saves,
    logits,
    losses,
    pair,
    peft,
)

pytestmark = pytest.mark.slow
LM = {"task_type": "CAUSAL_LM"}


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "target_modules": LAYERS, **LM, **options})


def on_layers(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(**{"target_modules": LAYERS, **options})


def prompts(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(**LM, num_virtual_tokens=4, **options)


CONFIGS: dict[str, Callable[[], Any]] = {
    "rslora on all layers": lora(target_modules="all-linear", use_rslora=True),
    "dora": lora(use_dora=True),
    "lora of gaussians": lora(init_lora_weights="gaussian"),
    "orthogonal lora": lora(init_lora_weights="orthogonal"),
    "lora with a bias": lora(lora_bias=True),
    "lora on the table": lora(target_modules=["q_proj", "embed_tokens"]),
    "lora and trained tokens": lora(trainable_token_indices=[1, 2, 3]),
    "ranks by layer": lora(rank_pattern={"q_proj": 2}),
    "adalora": on_layers("AdaLoraConfig", target_r=2, init_r=4, total_step=20, **LM),
    "boft": on_layers("BOFTConfig", boft_block_size=8),
    "c3a": on_layers("C3AConfig", block_size=8),
    "fourierft": on_layers("FourierFTConfig", n_frequency=16),
    "hra": on_layers("HRAConfig", r=4),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", *LAYERS], feedforward_modules=["down_proj"], **LM),
    "layer norms": lambda: peft.LNTuningConfig(**LM),
    "loha": on_layers("LoHaConfig", r=4),
    "lokr": on_layers("LoKrConfig", r=4),
    "miss": on_layers("MissConfig", r=4),
    "oft": on_layers("OFTConfig", oft_block_size=8, r=0),
    "randlora": on_layers("RandLoraConfig", r=4),
    "road": on_layers("RoadConfig"),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=["q_proj"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[2, 3], target_modules=["embed_tokens"]),
    "vblora": on_layers("VBLoRAConfig", r=4, num_vectors=8, vector_length=16, topk=2),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "prefixes": prompts("PrefixTuningConfig"),
    "prompts from the table": prompts("PromptTuningConfig", prompt_tuning_init="SAMPLE_VOCAB"),
    "prompts of several tasks": prompts("MultitaskPromptTuningConfig", num_tasks=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_train_as_on_the_dense_model(name: str, tmp_path: Path):
    if name == "prompts of several tasks":
        small, dense = pair()
        for model in (small, dense):
            found = adapted(model, CONFIGS[name]())
            assert torch.isfinite(found(input_ids=IDS, labels=IDS, task_ids=torch.tensor([0, 1])).loss)
        return
    check_trains_and_saves(CONFIGS[name], tmp_path)


def test_a_module_that_is_trained_beside_adapters_trains_its_codebooks(tmp_path: Path):
    small, _ = pair()
    config = lora(modules_to_save=["lm_head"])
    model = adapted(small, config())
    found = losses(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"base_model.model.lm_head.modules_to_save.default.weight_rpq.codebooks"}
    assert found[-1] < found[0]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(small, tmp_path)), logits(model))


def test_loftq_starts_from_the_weights(tmp_path: Path):
    pytest.importorskip("scipy")
    config = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    check_trains_and_saves(config, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_start_by_changing_the_weights_are_refused(start: str):
    small, _ = pair()
    before = logits(small)
    with pytest.raises(RPQError, match="keep the change apart"):
        adapted(small, lora(init_lora_weights=start)())
    assert torch.equal(logits(small), before)


MERGING = [name for name in CONFIGS if "prompt" not in name and name not in ("prefixes", "layer norms")]


@pytest.mark.parametrize("name", MERGING)
def test_merging_is_refused_with_what_to_do_or_done(name: str):
    small, dense = pair()
    model, twin = adapted(small, CONFIGS[name]()), adapted(dense, CONFIGS[name]())
    losses(model, 2)
    losses(twin, 2)
    before = logits(model)
    try:
        twin.merge_and_unload()
    except Exception as error:  # peft's own refusal
        with pytest.raises(type(error)):
            model.merge_and_unload()
        return
    with pytest.raises(RPQError, match=r"merge it|keep the change apart"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model), before)


def test_several_adapters_at_a_time():
    small, dense = pair()
    found = []
    for base in (small, dense):
        model = adapted(base, lora()())
        torch.manual_seed(3)
        model.add_adapter("b", lora(r=2)())
        model.set_adapter("b")
        losses(model)
        model.set_adapter("default")
        losses(model)
        model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "c", combination_type="cat")
        model.set_adapter("c")
        model.delete_adapter("b")
        found.append(logits(model))
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(base))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_preparing_for_training_in_few_bits(reentrant: bool):
    small, dense = pair()
    found = []
    for base in (small, dense):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        found.append(losses(adapted(peft.prepare_model_for_kbit_training(base, **options), lora()())))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-4)
