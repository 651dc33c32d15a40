"""What from_pretrained makes of a folder trains, adapts, generates and serves as the model that was saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import rpqfx
from rpqfx.errors import RewriteError
from tests.models import quantized_weights
from tests.slow.test_transformers import DECODING, Rows, adapted, inputs, logits, quiet, rewritten, trained

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with quiet():
        yield


def opened(name: str, folder: Path, init: str = "random") -> tuple[Any, Any]:
    """A rewritten model, and what comes of its folder."""
    small, _ = rewritten(name, init)
    small.save_pretrained(folder)
    return small, type(small).from_pretrained(folder)


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("name", ["llama tied", "t5", "mixtral"])
def test_it_generates_the_same(name: str, how: str, tmp_path: Path):
    found = []
    for model in opened(name, tmp_path):
        torch.manual_seed(3)
        found.append(model.generate(inputs(name)["input_ids"], max_new_tokens=8, min_new_tokens=8, **DECODING[how]))
    assert torch.equal(*found) and found[0].shape[1] >= 8


def test_a_pipeline_serves_a_folder(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    small, _ = opened("llama tied", tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(300)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w1"
    ).save_pretrained(tmp_path)
    ids = inputs("llama tied")["input_ids"][:1]
    wanted = small.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist()
    text = " ".join(f"w{n}" for n in ids[0].tolist())
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    said = pipe(text, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert said.replace(" ", "") == "".join(f"w{n}" for n in wanted)


@pytest.mark.parametrize("name", ["llama tied", "bert"])
def test_trainer_resumes_and_finds_the_best_again(name: str, tmp_path: Path):
    pytest.importorskip("accelerate")
    first, second = opened(name, tmp_path / "start")
    assert torch.equal(logits(first, name), logits(second, name))
    losses, best = [], []
    for model, resume in ((second, None), (copy.deepcopy(second), str(tmp_path / "out" / "checkpoint-2"))):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, learning_rate=1e-2, max_steps=4,
            logging_steps=1, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            metric_for_best_model="eval_loss", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(name), eval_dataset=Rows(name))
        trainer.train(resume_from_checkpoint=resume)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        best.append(trainer.state.best_model_checkpoint)
        again = type(model).from_pretrained(best[-1])
        assert torch.equal(logits(model.eval(), name), logits(again, name))
        trainer.save_model(str(tmp_path / "saved"))
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved"), name), logits(model, name))
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0] and losses[1] == losses[0] and best[0] == best[1]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_adapters_train_on_it(name: str, options: dict[str, Any], tmp_path: Path):
    peft = pytest.importorskip("peft")
    small, base = opened(name, tmp_path / "base")
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wi"]}[name]
    model = adapted(base, target_modules=targets, **options)
    before = {key: weight.codes.clone() for key, weight in quantized_weights(base).items()}
    losses = trained(model, name)
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight.codes, before[key]) for key, weight in quantized_weights(base).items())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(type(small).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), name), logits(model.eval(), name))
    with pytest.raises(RewriteError, match="would change"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload().eval(), name), logits(small, name))


def test_prompts_are_tuned_on_it(tmp_path: Path):
    peft = pytest.importorskip("peft")
    _, base = opened("llama tied", tmp_path)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    losses = trained(model, "llama tied")
    assert losses[-1] < losses[0]


def test_adapters_on_a_model_that_is_quantized_while_it_is_loaded(tmp_path: Path):
    from tests.slow.test_transformers import build

    dense = build("llama")
    dense.save_pretrained(tmp_path)
    base = type(dense).from_pretrained(tmp_path, quantization_config=rpqfx.RPQConfig(bits_per_weight=5))
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    losses = trained(model, "llama")
    assert losses[-1] < losses[0]
    assert base.half().dtype == torch.float16  # as an ordinary model


@pytest.mark.parametrize("init", ["random", "fit"])
def test_tables_of_it_are_resized(init: str, tmp_path: Path):
    small, again = opened("llama tied", tmp_path / "first", init)
    for model in (small, again):
        torch.manual_seed(0)
        model.resize_token_embeddings(310)
    assert torch.equal(logits(small, "llama tied"), logits(again, "llama tied"))
    again.save_pretrained(tmp_path / "second")
    third = type(again).from_pretrained(tmp_path / "second")
    assert torch.equal(logits(third, "llama tied"), logits(again, "llama tied"))


def test_it_is_offloaded_to_the_disk_as_a_dense_model(tmp_path: Path):
    pytest.importorskip("accelerate")
    small, _ = opened("llama tied", tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    away = type(small).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "away")
    assert torch.equal(logits(away, "llama tied"), logits(small, "llama tied"))
