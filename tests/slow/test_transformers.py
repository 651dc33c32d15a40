"""Rewritten transformers models do what that library, peft and Trainer do with models.

All are built from tiny configs with random weights. Wherever outputs are compared, it is with the dense model that
holds the expanded weights, given the same seed.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy
from rpqfx.errors import RewriteError
from rpqfx.nn.weight_slice import Part
from tests.models import filled, quantized_weights
from tests.test_docs import ROOT, run

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.slow

TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
TINY = {
    "vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64,
    "max_position_embeddings": 64, **TOKENS,
}  # fmt: skip
LLAMA = {**TINY, "intermediate_size": 128, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, **TOKENS}
T5 = {
    "vocab_size": 300, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
WHISPER = {
    "vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16,
    "max_source_positions": 32, "max_target_positions": 32, "decoder_start_token_id": 2, "suppress_tokens": None,
    "begin_suppress_tokens": None, **TOKENS,
}  # fmt: skip
VIT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32,
    "patch_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "drop_path_rate": 0.3, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
RESNET = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
# By name: the config and its values, the model, and whether input and output tables are tied.
MODELS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "llama": ("LlamaConfig", LLAMA, "LlamaForCausalLM", False),
    "llama tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, "LlamaForCausalLM", True),
    "gpt2": ("GPT2Config", GPT2, "GPT2LMHeadModel", True),
    "opt": ("OPTConfig", {**TINY, "ffn_dim": 128, "word_embed_proj_dim": 64}, "OPTForCausalLM", True),
    "phi": ("PhiConfig", {**TINY, "intermediate_size": 128}, "PhiForCausalLM", False),
    "t5": ("T5Config", T5, "T5ForConditionalGeneration", True),
    "bert": ("BertConfig", {**TINY, "intermediate_size": 128}, "BertForMaskedLM", True),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 300, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
        "DistilBertForMaskedLM",
        True,
    ),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, "MixtralForCausalLM", False),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**LLAMA, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        "Qwen3MoeForCausalLM",
        False,
    ),
    "whisper": ("WhisperConfig", WHISPER, "WhisperForConditionalGeneration", True),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, **TOKENS},
        "MambaForCausalLM",
        True,
    ),
    "vit": ("ViTConfig", VIT, "ViTForImageClassification", False),
    "swin": ("SwinConfig", SWIN, "SwinForImageClassification", False),
    "resnet": ("ResNetConfig", RESNET, "ResNetForImageClassification", False),
}
IMAGES = ("vit", "swin", "resnet")
TEXT = [name for name in MODELS if name not in IMAGES]
TIED = [name for name in TEXT if MODELS[name][3]]
GENERATING = [name for name in TEXT if "bert" not in name]
POLICIES = {
    "random": Policy.from_scratch(codebook_dim=8, codebook_bits=4, min_size=1024),
    "fit": Policy(codebook_dim=8, codebook_bits=4, min_size=1024),
}


def build(name: str, **changes: Any) -> Any:
    config, values, architecture, _ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, architecture)(getattr(transformers, config)(**{**values, **changes})).eval()


def rewritten(name: str, init: str = "random", **changes: Any) -> tuple[Any, Any]:
    """A rewritten model, and the dense one that holds its expanded weights."""
    model = build(name, **changes)
    small = rpqfx.rpqify(model, POLICIES[init])
    assert type(small) is type(model) and len(quantized_weights(small)) > 3
    return small, filled(model, small)


def inputs(name: str, batch: int = 2, vocabulary: int = 280) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (batch, 12), generator=g)
    if name in IMAGES:
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=g), "labels": torch.arange(batch) % 2}
    if name == "whisper":
        return {"input_features": torch.randn(batch, 16, 64, generator=g), "labels": ids[:, :6]}
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model(**inputs(name)).logits


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * max(1.0, float(wanted.abs().max())))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_values(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert [name for name, tensor in before.items() if not torch.equal(now[name], tensor)] == []


def tables(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


# --------------------------------------------------------------------------------------------- forward and generate


@pytest.mark.parametrize("init", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_dense_models(name: str, init: str):
    small, dense = rewritten(name, init)
    assert_close(logits(small, name), logits(dense, name))


DECODING = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "without a cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str, how: str):
    small, dense = rewritten(name)
    first = inputs(name)["input_features" if name == "whisper" else "input_ids"]
    found = []
    for model in (small, dense):
        torch.manual_seed(3)
        found.append(model.generate(first, max_new_tokens=8, min_new_tokens=8, **DECODING[how]))
    assert torch.equal(*found) and found[0].shape[1] >= 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_errs_as_the_dense_model_does(name: str, dtype: torch.dtype):
    small, dense = rewritten(name)
    exact = logits(dense, name)
    errors = []
    for model in (small.to(dtype), dense.to(dtype)):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
        with torch.no_grad():
            errors.append(float((model(**given).logits.float() - exact).abs().max()))
    assert errors[0] < 4 * errors[1] + 1e-3


@pytest.mark.parametrize("experts", ["shared", "own"])
@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_no_experts_weight_is_ever_made(name: str, way: str, experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward run on the codebooks of the experts in use, whichever way the library runs them."""
    model = build(name)
    model.set_experts_implementation(way)
    small = rpqfx.rpqify(model, Policy.from_scratch(codebook_dim=8, codebook_bits=4, min_size=1024, experts=experts))
    dense = filled(model, small)
    assert [site for site in rpqfx.report(small).rewritten if "experts" in site.name]
    wanted = dense(**inputs(name)).loss
    monkeypatch.setattr(Part, "dense", lambda self: pytest.fail("expanded"))
    found = small(**inputs(name)).loss
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama tied", "opt", "mixtral", "t5", "vit"])
def test_compiles_into_one_graph(name: str):
    small, dense = rewritten(name)
    for model in (dense, small):  # dense first: what cannot be compiled so anyway proves nothing
        torch._dynamo.reset()
        assert_close(logits(torch.compile(model, fullgraph=True, backend="eager"), name), logits(dense, name))


def test_a_decoding_step_compiles_into_one_graph():
    small, dense = rewritten("llama")
    ids, found = inputs("llama")["input_ids"], []
    for model in (dense, small):
        torch._dynamo.reset()
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        step = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            model(ids, past_key_values=cache, cache_position=torch.arange(12))
            found.append(step(ids[:, :1], past_key_values=cache, cache_position=torch.tensor([12])).logits)
    assert_close(found[1], found[0])


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", MODELS)
def test_train_mode_is_the_dense_models(name: str):
    """Dropout, stochastic depth and batch norm: equal outputs from one seed, equal running statistics, step by step."""
    small, dense = (model.train() for model in rewritten(name))
    for seed in range(3):
        found = []
        for model in (small, dense):
            torch.manual_seed(seed)
            found.append(model(**inputs(name, 4)))
        assert_close(found[0].loss, found[1].loss)
        assert_close(found[0].logits, found[1].logits, 1e-3)
    buffers = dict(dense.named_buffers())
    for key, buffer in small.named_buffers():
        if key in buffers:
            torch.testing.assert_close(buffer, buffers[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet", "mamba")])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool):
    small, _ = rewritten(name)
    plain, saving = copy.deepcopy(small).train(), small.train()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if name not in IMAGES and name != "whisper":
        saving.enable_input_require_grads()  # the older kind needs it
    losses = []
    for model in (plain, saving):
        torch.manual_seed(1)
        losses.append(model(**inputs(name)).loss)
        losses[-1].backward()
    assert_close(losses[1], losses[0], 1e-6)
    wanted = dict(plain.named_parameters())
    assert sum(parameter.grad is not None for parameter in wanted.values()) > 3
    for key, parameter in saving.named_parameters():
        assert (parameter.grad is None) == (wanted[key].grad is None), key
        if parameter.grad is not None:
            assert_close(parameter.grad, wanted[key].grad, 1e-5)


class Rows(torch.utils.data.Dataset):
    def __init__(self, name: str) -> None:
        self.columns = inputs(name, 8)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: column[index % 8] for key, column in self.columns.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
def test_trainer_trains_saves_and_resumes(name: str, tmp_path: Path):
    pytest.importorskip("accelerate")
    small, _ = rewritten(name)
    start, losses = copy.deepcopy(small), []
    for model, resume in ((small, None), (start, str(tmp_path / "checkpoint-4"))):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, learning_rate=1e-2, max_steps=8, logging_steps=1,
            save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(name))
        trainer.train(resume_from_checkpoint=resume)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 8 and losses[0][-1] < losses[0][0] and losses[1] == losses[0]
    ours = start.state_dict()
    for key, tensor in small.state_dict().items():
        torch.testing.assert_close(ours[key], tensor)
    assert not MODELS[name][3] or tables(start)[1].weight_rpq is tables(start)[0].weight_rpq


# --------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("init", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_writes_the_state_dict_under_its_own_names(name: str, init: str, tmp_path: Path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    small, _ = rewritten(name, init)
    small.save_pretrained(tmp_path)
    written, own = load_file(tmp_path / "model.safetensors"), small.state_dict()
    assert any(key.endswith("_rpq.codes") for key in written) and any(key.endswith("_rpq.codebooks") for key in written)
    same = {key: tensor for key, tensor in written.items() if key in own and not key.endswith("_rpq.codes")}
    assert all(torch.equal(tensor, own[key]) for key, tensor in same.items())
    assert {key for key in written if key.endswith("_rpq.codes")} <= set(own)  # packed
    again, _ = rewritten(name, init)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    missing, unexpected = again.load_state_dict(written, strict=False)
    left_out = {own[key].data_ptr() for key in missing}  # of tied tensors, all names but one
    assert not unexpected and left_out <= {own[key].data_ptr() for key in written if key in own}
    assert bool(missing) == MODELS[name][3]
    assert torch.equal(logits(again.eval(), name), logits(small, name))


@pytest.mark.parametrize("sharing", ["role", "shape"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
def test_codebooks_that_layers_share_are_written_once(name: str, sharing: str, tmp_path: Path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    policy = Policy.from_scratch(codebook_dim=8, codebook_bits=4, min_size=1024, sharing=sharing)
    small = rpqfx.rpqify(build(name), policy)
    small.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert sum("codebooks" in key for key in written) < sum("codes" in key for key in written)
    again = rpqfx.rpqify(build(name), policy)
    assert not again.load_state_dict(written, strict=False).unexpected_keys
    assert torch.equal(logits(again, name), logits(small, name))
    before = values(small)
    small.tie_weights()
    small.init_weights()
    assert_same_values(small, before)
    if name != "vit":
        before = logits(small, name)
        small.resize_token_embeddings(310)
        assert torch.equal(logits(small, name)[..., :300], before)


def converted(name: str) -> Any:
    """A model whose codebooks, which layers share, were trained on what calibration showed."""
    policy = Policy(codebook_dim=8, codebook_bits=4, min_size=1024, sharing="shape")
    return rpqfx.convert(build(name), policy, [inputs(name)], progress=False)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "t5", "bert", "vit"])
def test_converted_models_are_saved_by_every_standard_call(name: str, tmp_path: Path):
    """Their codebooks are shared only when they have been trained."""
    from safetensors.torch import load_file, load_model, save_model

    small = converted(name)
    shared = [weight.codebooks for weight in quantized_weights(small).values()]
    assert len({id(books) for books in shared}) < len(shared)
    wanted = logits(small, name)
    rpqfx.save(small, tmp_path / "m.rpq")
    loaded = rpqfx.load(tmp_path / "m.rpq", lambda: build(name)).eval()
    for number, model in enumerate((small, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded)):
        model.tie_weights()
        model.save_pretrained(tmp_path / str(number), max_shard_size="50kB" if number == 1 else "5GB")
        written: dict[str, Tensor] = {}
        for part in (tmp_path / str(number)).glob("*.safetensors"):
            written |= load_file(part)
        again = converted(name)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.add_(1)
        assert not again.load_state_dict(written, strict=False).unexpected_keys
        assert torch.equal(logits(again.eval(), name), wanted)
    torch.save(small, tmp_path / "whole.pt")
    assert torch.equal(logits(torch.load(tmp_path / "whole.pt", weights_only=False), name), wanted)
    save_model(small, str(tmp_path / "model.safetensors"))
    again = converted(name)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    load_model(again, str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(again.eval(), name), wanted)


@pytest.mark.parametrize("name", ["llama", "llama tied", "bert"])
def test_trainer_resumes_a_converted_model_from_its_checkpoint(name: str, tmp_path: Path):
    pytest.importorskip("accelerate")
    small, losses = converted(name), []
    for model, resume in ((small, None), (converted(name), str(tmp_path / "checkpoint-2"))):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, learning_rate=1e-2, max_steps=4, logging_steps=1,
            save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(name))
        trainer.train(resume_from_checkpoint=resume)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        last = model
    assert len(losses[0]) == 4 and losses[1] == losses[0]
    for key, tensor in small.state_dict().items():
        torch.testing.assert_close(last.state_dict()[key], tensor)


def test_distributed_checkpoints_hold_what_a_converted_model_has(tmp_path: Path):
    from torch.distributed import checkpoint

    small, again = converted("llama tied"), converted("llama tied")
    checkpoint.save(small.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    state = again.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    again.load_state_dict(state)
    assert torch.equal(logits(again.eval(), "llama tied"), logits(small, "llama tied"))


def test_every_option_of_a_spec_is_written_tied_and_resized(tmp_path: Path):
    policy = Policy.from_scratch(codebook_dim=8, codebook_bits=4, min_size=1024, scale=True, signs=True, stages=2)
    small = rpqfx.rpqify(build("gpt2").bfloat16(), policy)
    small.tie_weights()
    before = logits(small, "gpt2")
    small.resize_token_embeddings(310)
    assert torch.equal(logits(small, "gpt2")[..., :300], before)
    small.save_pretrained(tmp_path)
    assert tables(small)[0].weight_rpq is tables(small)[1].weight_rpq


def test_a_model_with_a_quantised_cache_is_saved_by_the_standard_call(tmp_path: Path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    dense = build("llama")
    policy = rpqfx.KVPolicy(bits_per_value=4, window=8, sinks=2, codebook_size=16, chunk=8)
    batches = [{"input_ids": inputs("llama")["input_ids"].repeat(1, 4)} for _ in range(2)]
    for model in (dense, rpqfx.rpqify(dense, POLICIES["random"])):
        small = rpqfx.quantize_kv(model, policy, calibration=batches)
        small.save_pretrained(tmp_path)
        again = rpqfx.quantize_kv(model, policy, calibration=batches[:1], fit=False)
        missing = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert not missing.unexpected_keys and all(key.endswith("codebooks") for key in missing.missing_keys)
        torch.testing.assert_close(logits(again, "llama"), logits(small, "llama"), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_with_a_config(name: str, tmp_path: Path):
    small, _ = rewritten(name)
    rpqfx.save(small, tmp_path / "model.rpq")
    kind, config = type(small), copy.deepcopy(small.config)
    again = rpqfx.load(tmp_path / "model.rpq", lambda: kind(config)).eval()
    assert torch.equal(logits(again, name), logits(small, name))
    before = values(again)
    again.tie_weights()
    assert_same_values(again, before)


def test_auto_classes_build_what_is_loaded(tmp_path: Path):
    small, _ = rewritten("llama")
    rpqfx.save(small, tmp_path / "model.rpq")
    again = rpqfx.load(
        tmp_path / "model.rpq", lambda: transformers.AutoModelForCausalLM.from_config(small.config)
    ).eval()
    assert torch.equal(logits(again, "llama"), logits(small, "llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_copies_and_pickles_are_models_of_their_own(name: str):
    small, _ = rewritten(name)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(logits(again, name), logits(small, name))
        again.resize_token_embeddings(310)
        assert tables(again)[1].weight_rpq.spec.num_vectors == 310
        assert tables(small)[1].weight_rpq.spec.num_vectors == 300


@pytest.mark.parametrize("init", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "mixtral"])
def test_a_dense_checkpoint_is_read_and_then_rewritten(name: str, init: str, tmp_path: Path):
    build(name).save_pretrained(tmp_path)
    model = getattr(transformers, MODELS[name][2]).from_pretrained(tmp_path, local_files_only=True).eval()
    small = rpqfx.rpqify(model, POLICIES[init])
    assert_close(logits(small, name), logits(filled(model, small), name))
    small.save_pretrained(tmp_path / "again")
    assert_same_values(small, values(small))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_the_meta_device_is_rewritten_and_materialised(name: str):
    config = build(name).config
    with torch.device("meta"):
        model = getattr(transformers, MODELS[name][2])(config)
    small = rpqfx.materialize(rpqfx.rpqify(model, POLICIES["random"])).eval()
    assert not any(tensor.is_meta for tensor in (*small.parameters(), *small.buffers()))
    assert bool(torch.isfinite(logits(small, name)).all())
    held = {key: tensor for key, tensor in values(small).items() if "_rpq." in key}
    small.init_weights()  # draws the dense tensors again, as of a dense model, and no codebook
    now = small.state_dict()
    assert held and all(torch.equal(now[key], tensor) for key, tensor in held.items())


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "whisper"])
def test_to_empty_and_a_state_dict(name: str):
    small, _ = rewritten(name)
    again = copy.deepcopy(small)
    again.to_empty(device="cpu")
    again.load_state_dict(small.state_dict())
    assert torch.equal(logits(again, name), logits(small, name))


# ------------------------------------------------------------------------------------------------------------ ties


@pytest.mark.parametrize("name", MODELS)
def test_ties_are_renewed_and_weights_initialised_without_harm(name: str):
    small, _ = rewritten(name)
    before, modules = values(small), dict(small.named_modules(remove_duplicate=False))
    for renew in (small.tie_weights, lambda: small.tie_weights(recompute_mapping=False)):
        renew()
        assert_same_values(small, before)
    small.init_weights()
    small.post_init()
    assert_same_values(small, before)
    assert dict(small.named_modules(remove_duplicate=False)) == modules


@pytest.mark.parametrize("name", TIED)
def test_tied_stays_tied_under_training(name: str):
    small, _ = rewritten(name)
    small.tie_weights()
    table, head = tables(small)
    assert head.weight_rpq is table.weight_rpq
    optimiser = torch.optim.SGD(small.parameters(), 0.1)
    small.train()(**inputs(name)).loss.backward()
    optimiser.step()
    assert torch.equal(head.weight_rpq(), table.weight_rpq())


# ------------------------------------------------------------------------------------------------- resizing tables


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("rows", [310, 290])
@pytest.mark.parametrize("init", POLICIES)
@pytest.mark.parametrize("name", TEXT)
def test_resize_token_embeddings(name: str, init: str, rows: int, mean_resizing: bool):
    small, dense = rewritten(name, init)
    old = [table.weight_rpq.codes.clone() for table in tables(small)]
    before, kinds = logits(small, name), [type(table) for table in tables(small)]
    for model in (small, dense):
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=mean_resizing)
    assert small.config.get_text_config().vocab_size == rows
    assert [type(table) for table in tables(small)] == kinds
    assert (tables(small)[0].weight_rpq is tables(small)[1].weight_rpq) == MODELS[name][3]
    assert tables(small)[0].num_embeddings == tables(small)[1].out_features == rows
    kept = min(rows, 300)
    for table, codes in zip(tables(small), old, strict=True):
        assert table.weight_rpq.spec.num_vectors == rows
        assert torch.equal(table.weight_rpq.codes[..., :kept], codes[..., :kept])
    after = logits(small, name)  # ids below 280: their rows are what they were
    assert after.shape[-1] == rows and torch.equal(after[..., :kept], before[..., :kept])
    assert_close(after[..., :kept], logits(dense, name)[..., :kept])
    shapes = {name: record.shape for record in rpqfx.report(small).rewritten for name in record.names}
    assert [shapes[f"{path}.weight"][0] for path, module in small.named_modules() if module in tables(small)] == [
        rows
    ] * 2
    loss = small.train()(**inputs(name)).loss
    loss.backward()
    assert tables(small)[0].weight_rpq.codebooks.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "bert"])
def test_new_rows_are_near_what_transformers_gave_them(name: str):
    """No old row (but that of padding, which is zero) is nearer to a new one than what it became."""
    small, dense = rewritten(name)
    for model in (small, dense):
        torch.manual_seed(0)
        model.resize_token_embeddings(304)
    wanted, found = (model.get_input_embeddings().weight.detach() for model in (dense, small))
    for row, near in zip(wanted[300:], found[300:], strict=True):
        assert float((row - near).norm()) <= float((wanted[2:300] - row).norm(dim=1).min())
    assert torch.equal(tables(small)[1].weight.detach()[:300], tables(dense)[1].weight.detach()[:300])


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_resized_models_are_saved_generate_and_train(name: str, tmp_path: Path):
    small, _ = rewritten(name)
    small.resize_token_embeddings(310, pad_to_multiple_of=64)
    assert small.config.vocab_size == 320
    small.resize_token_embeddings(305)
    rpqfx.save(small, tmp_path / "model.rpq")
    kind, config = type(small), copy.deepcopy(small.config)
    again = rpqfx.load(tmp_path / "model.rpq", lambda: kind(config)).eval()
    assert torch.equal(logits(again, name), logits(small, name))
    small.save_pretrained(tmp_path / "plain")
    if name != "bert":
        assert small.generate(inputs(name)["input_ids"], max_new_tokens=4, do_sample=False).shape[0] == 2


def test_a_head_that_cannot_be_resized_is_refused_before_anything_changes():
    policy = Policy.from_scratch(
        codebook_dim=10, codebook_bits=4, rules=(rpqfx.Rule("lm_head.weight", split="column"),)
    )
    small = rpqfx.rpqify(build("llama", hidden_size=80, head_dim=20), policy)
    before = values(small)
    with pytest.raises(RewriteError, match='split="row"'):
        small.resize_token_embeddings(310)
    assert_same_values(small, before)
    assert small.config.vocab_size == 300 and small.get_input_embeddings().num_embeddings == 300


# ------------------------------------------------------------------------------------------------------------ peft

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "v", "wi"],
    "bert": ["query", "dense"], "mixtral": ["q_proj"], "whisper": ["q_proj", "fc1"], "vit": ["q_proj", "fc1"],
    "mamba": ["in_proj", "x_proj"],
}  # fmt: skip


def adapted(small: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    return peft.get_peft_model(small, peft.LoraConfig(r=4, lora_alpha=8, **options))


def trained(model: Any, name: str, steps: int = 4) -> list[float]:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)
        loss = model.train()(**inputs(name)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    model.eval()
    return losses


def without_adapters(model: Any) -> dict[str, Tensor]:
    state = model.get_base_model().state_dict()
    return {key.replace(".base_layer", ""): tensor for key, tensor in state.items() if "lora_" not in key}


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_train_and_nothing_else_does(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    peft = pytest.importorskip("peft")
    small, _ = rewritten(name)
    before, untouched = values(small), copy.deepcopy(small)
    model = adapted(small, target_modules=TARGETS[name])
    assert any("_rpq" in key for key in model.state_dict() if ".base_layer." in key)  # they target held weights
    assert torch.equal(logits(model.eval(), name), logits(untouched, name))
    model.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out
    assert all(("lora_" in key) == p.requires_grad for key, p in model.named_parameters())
    losses = trained(model, name)
    assert losses[-1] < losses[0]
    assert {key for key, tensor in without_adapters(model).items() if not torch.equal(tensor, before[key])} == set()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
    again = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    assert torch.equal(logits(again.eval(), name), logits(model, name))
    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(untouched, name))
    assert torch.equal(logits(model.unload(), name), logits(untouched, name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_an_adapter_into_codebooks_is_refused(name: str):
    small, _ = rewritten(name)
    model = adapted(small, target_modules=TARGETS[name])
    trained(model, name)
    before, held = logits(model, name), values(model)
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(RewriteError, match="would change"):
            merge()
        assert torch.equal(logits(model, name), before)
        assert_same_values(model, held)


def test_what_a_refused_merge_had_merged_still_computes_the_same():
    """Some targets are dense: those before the first that is held may be merged already."""
    rules = (rpqfx.Rule("*.q_proj.weight", skip="stays dense"),)
    small = rpqfx.rpqify(
        build("llama"), Policy.from_scratch(codebook_dim=8, codebook_bits=4, min_size=1024, rules=rules)
    )
    model = adapted(small, target_modules=["q_proj", "v_proj"])
    trained(model, "llama")
    before = logits(model, "llama")
    with pytest.raises(RewriteError):
        model.merge_adapter()
    assert_close(logits(model, "llama"), before, 1e-5)
    model.unmerge_adapter()
    assert_close(logits(model, "llama"), before, 1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_start_by_changing_the_weight_are_refused(start: str):
    small, _ = rewritten("llama")
    before = values(small)
    with pytest.raises(RewriteError, match="would change the values"):
        adapted(small, target_modules=["q_proj"], init_lora_weights=start)
    assert_same_values(small, before)


def test_adapters_that_take_the_weight_apart():
    small, _ = rewritten("llama")
    before, held = logits(small, "llama"), values(small)
    model = adapted(small, target_modules=["q_proj", "v_proj"], use_dora=True)
    assert_close(logits(model.eval(), "llama"), before)
    losses = trained(model, "llama")
    assert losses[-1] < losses[0]
    assert_same_values(model.unload(), held)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_on_tables_and_on_tokens(name: str):
    table = {"llama": "embed_tokens", "gpt2": "wte"}[name]
    for options in (
        {"target_modules": [table]},
        {"target_modules": TARGETS[name], "trainable_token_indices": {table: [5, 6, 7]}},
        {"target_modules": TARGETS[name], "modules_to_save": ["ln_f" if name == "gpt2" else "norm"]},
    ):
        small, _ = rewritten(name)
        before = logits(small, name)
        model = adapted(small, **options)
        assert_close(logits(model.eval(), name), before)
        losses = trained(model, name)
        assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------- the guide


def test_the_guides_snippets_run_and_print_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for extra in ("peft", "accelerate", "safetensors"):
        pytest.importorskip(extra)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "guides" / "transformers.md"
    text = page.read_text(encoding="utf-8")
    everything, left_out = re.subn(r"^<!-- no-run: .* -->\n", "", text, flags=re.MULTILINE)
    assert left_out == text.count("```python\n") > 3
    run(page.name, everything)
