"""save_pretrained and from_pretrained of transformers with quantized models."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import pickle
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rpqfx
from rpqfx import KeepDense, KVPolicy, Policy, Quantize, RoutePolicy, Site
from rpqfx.codebook.packing import packed_bytes
from rpqfx.errors import FormatError, InputError, PolicyError, RPQError
from rpqfx.storage.archive import read_bytes
from rpqfx.storage.container import FORMAT, SEAL, open_container
from rpqfx.storage.sealed_manifest import checksum, seal_of
from tests import forks
from tests.contracts.test_memory import peak
from tests.models import quantized_weights

transformers = pytest.importorskip("transformers", minversion="5.0")
safetensors = pytest.importorskip("safetensors.torch")

TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {**TINY, "num_key_value_heads": 2, "tie_word_embeddings": True}
POLICY = Policy.from_scratch(codebook_dim=8, codebook_bits=5, min_size=1024)
WIDE = Policy.from_scratch(codebook_dim=4, codebook_bits=9, min_size=1024, allow_growth=True, scale=True, signs=True)
KV = KVPolicy(sinks=2, window=4, codebook_size=16, chunk=8)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY)).eval()


def in_tiles(site: Any) -> Any:
    """Two stages of drawn codes that lie in tiles."""
    answer = Policy.from_scratch(codebook_dim=4, codebook_bits=4, stages=2, sharing="layer", min_size=1024)(site)
    if not isinstance(answer, rpqfx.Quantize):
        return answer
    return dataclasses.replace(answer, spec=dataclasses.replace(answer.spec, tiled=True))


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(ids()).logits


def reopened(small: Any, folder: Path, **options: Any) -> Any:
    """What from_pretrained makes of a model's folder; transformers has nothing to remark."""
    small.save_pretrained(folder)
    again, info = type(small).from_pretrained(folder, output_loading_info=True, **options)
    assert {name: found for name, found in info.items() if found} == {}
    return again


def learned(small: Any) -> Any:
    """The model with codes that are not as they were drawn, so that files hold them."""
    for weight in set(quantized_weights(small).values()):
        weight.codes = weight.codes.flip(-1)
    return small


MODELS = {
    "tied decoder": lambda: rpqfx.rpqify(llama(), POLICY),
    "untied decoder": lambda: learned(rpqfx.rpqify(llama(tie_word_embeddings=False), POLICY)),
    "encoder": lambda: rpqfx.rpqify(bert(), POLICY),
    "codes of two bytes, scales, signs": lambda: rpqfx.rpqify(llama(), WIDE),
    "learned codes of two bytes": lambda: learned(rpqfx.rpqify(llama(), WIDE)),
    "random codes in tiles": lambda: rpqfx.rpqify(llama(num_hidden_layers=1), in_tiles),
    "converted": lambda: rpqfx.rpqify(llama(num_hidden_layers=1), Policy.pretrained(5)),
    "keys and values": lambda: rpqfx.quantize_kv(llama(), KV, calibration=[ids()], progress=False),
    "all": lambda: rpqfx.quantize_kv(
        rpqfx.route(rpqfx.rpqify(llama(), POLICY), RoutePolicy(window=8, attention=None), seed=1), KV,
        calibration=[ids()], progress=False,
    ),
    "routed": lambda: rpqfx.route(llama(), RoutePolicy(window=8, attention=None), seed=1),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_to_the_last_bit(name: str, tmp_path: Path) -> None:
    small = MODELS[name]().eval()
    again = reopened(small, tmp_path)
    assert torch.equal(logits(again), logits(small))
    state = again.state_dict()
    assert state.keys() == small.state_dict().keys() and type(again) is type(small)
    for key, tensor in small.state_dict().items():
        assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype, key
    flags = {key: p.requires_grad for key, p in small.named_parameters(remove_duplicate=False)}
    assert {key: p.requires_grad for key, p in again.named_parameters(remove_duplicate=False)} == flags
    assert torch.equal(logits(reopened(again, tmp_path / "twice")), logits(small))


def test_codes_take_the_bits_that_they_need_and_shards_the_bytes_that_they_may(tmp_path: Path) -> None:
    small = learned(rpqfx.rpqify(llama(), POLICY)).eval()
    small.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 60_000 for shard in shards)
    stored = {name: tensor for shard in shards for name, tensor in safetensors.load_file(shard).items()}
    for name, weight in quantized_weights(small).items():
        codes = stored.get(f"{name}_rpq.codes")
        if codes is not None:  # not that of another name of a tied weight
            assert codes.shape == (packed_bytes(weight.codes.numel(), weight.spec.entries),)
    assert torch.equal(logits(type(small).from_pretrained(tmp_path)), logits(small))


def test_codes_that_were_drawn_are_a_seed_in_a_folder(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(), POLICY).eval()
    again = reopened(small, tmp_path)
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    codes = {name: tensor for name, tensor in stored.items() if name.endswith("_rpq.codes")}
    assert len(codes) > 10 and all(tensor.shape == (14,) for tensor in codes.values())
    for name, weight in quantized_weights(again).items():
        assert weight.drawn_stages() == (0,), name
    assert rpqfx.report(again).stored_bits == rpqfx.report(small).stored_bits
    one = next(iter(codes))
    stored[one][3] ^= 1
    with open(tmp_path / "model.safetensors", "rb") as file:
        metadata = open_container(file, "m.safetensors")
    manifest = json.loads(metadata.text)
    manifest["checksum"] = checksum(
        {name: tensor for name, tensor in stored.items() if name in metadata_names(manifest)}
    )
    text = json.dumps(manifest)
    safetensors.save_file(stored, tmp_path / "model.safetensors", {"format": "pt", FORMAT: text, SEAL: seal_of(text)})
    with pytest.raises(FormatError, match="others are drawn than were saved"):
        type(small).from_pretrained(tmp_path)


def metadata_names(manifest: dict[str, Any]) -> set[str]:
    return {entry["names"][0] for entry in manifest["tensors"]}


def test_a_state_dict_of_a_folder_brings_seeds(tmp_path: Path) -> None:
    """As Trainer loads its best checkpoint."""
    small = rpqfx.rpqify(llama(), POLICY).eval()
    table = small.model.embed_tokens.weight_rpq
    table.codes = table.codes.flip(-1)
    small.save_pretrained(tmp_path)
    torch.manual_seed(5)
    other = rpqfx.rpqify(llama(), POLICY).eval()
    for module in set(quantized_weights(other).values()):
        module.reset_parameters()
    assert not torch.equal(logits(other), logits(small))
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(logits(other), logits(small))
    assert rpqfx.report(other).stored_bits == rpqfx.report(small).stored_bits


def test_what_is_written_says_what_it_is(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(), POLICY)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    small.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["quantization_config"] == {
        "quant_method": "rpq", "format": 1, "version": rpqfx.__version__,
        "bits_per_weight": round(rpqfx.report(small).bits_per_weight, 4),
    }  # fmt: skip
    assert said["architectures"] == ["LlamaForCausalLM"]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n") and card.count("## Quantization: rpq") == 1
    assert "import rpqfx" in card and f"{rpqfx.report(small).bits_per_weight:.2f} bits a weight" in card


def test_saving_changes_nothing_of_the_model(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(), POLICY)
    before, config = dict(small.__dict__), copy.deepcopy(small.config.__dict__)
    values = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    small.save_pretrained(tmp_path)
    assert small.__dict__ == before and small.config.__dict__ == config
    assert all(torch.equal(tensor, values[name]) for name, tensor in small.state_dict().items())


def test_a_model_that_has_no_name_is_saved(tmp_path: Path) -> None:
    """It is gone before the call begins, and is not kept alive by what it can be saved with."""
    small = rpqfx.rpqify(llama(), POLICY).eval()
    wanted, card = logits(small), small.save_pretrained(tmp_path / "named")
    card = (tmp_path / "named" / "README.md").read_text()
    for number, make in enumerate((copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)))):
        make(small).save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(type(small).from_pretrained(tmp_path / str(number))), wanted)
    rpqfx.rpqify(llama(), POLICY).eval().save_pretrained(tmp_path / "made")
    assert (tmp_path / "made" / "README.md").read_text() == card
    kept = weakref.ref(small), weakref.ref(small.model.norm.weight)
    gc.disable()
    del small
    gone = [ref() is None for ref in kept]
    gc.enable()
    assert all(gone)


def test_copies_and_pickles_save_themselves(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(), POLICY).eval()
    for number, other in enumerate((copy.deepcopy(small), pickle.loads(pickle.dumps(small)))):
        with torch.no_grad():
            other.model.norm.weight.fill_(2.0)
        again = reopened(other, tmp_path / str(number))
        assert torch.equal(logits(again), logits(other)) and not torch.equal(logits(again), logits(small))


@pytest.mark.parametrize("options", [{"dtype": "auto"}, {"device_map": "auto"}, {"device_map": "cpu"}, {}])
def test_ways_to_open_a_folder(options: dict[str, Any], tmp_path: Path) -> None:
    if "device_map" in options:
        pytest.importorskip("accelerate")
    small = rpqfx.rpqify(llama(), POLICY).to(torch.bfloat16).eval()
    again = reopened(small, tmp_path, **options)
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(small))


def test_another_dtype_is_that_of_the_model_and_nothing_else(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(), POLICY).eval()
    again = reopened(small, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(small.to(torch.bfloat16))) or torch.allclose(
        logits(again), logits(small), rtol=0.05, atol=0.05
    )
    for name, weight in quantized_weights(small).items():
        assert torch.equal(weight.codes, quantized_weights(again)[name].codes)


def test_the_body_alone_and_under_another_head(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(tie_word_embeddings=False), POLICY).eval()
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = small.model(ids()).last_hidden_state
        assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path)(ids()).last_hidden_state, wanted)
        headed, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert torch.equal(headed.model(ids()).last_hidden_state, wanted)
        assert {*info["missing_keys"]} == {"score.weight"}
    small.model.save_pretrained(tmp_path / "body")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "body", tie_word_embeddings=False)
    with torch.no_grad():
        assert torch.equal(again.model(ids()).last_hidden_state, wanted)


class _Made(TorchDispatchMode):
    """Notes the sizes of floating tensors that hold values."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta and out.is_floating_point():
            self.sizes.add(out.numel())
        return out


def test_no_dense_weight_is_made(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(tie_word_embeddings=False, num_key_value_heads=4), POLICY)
    small.save_pretrained(tmp_path)
    dense = {weight.layout.rows * weight.layout.cols for weight in quantized_weights(small).values()}
    with _Made() as seen:
        type(small).from_pretrained(tmp_path)
    assert not dense & seen.sizes and seen.sizes, (dense, seen.sizes)
    with _Made() as seen:
        type(small).from_pretrained(tmp_path).lm_head.weight_rpq()
    assert dense & seen.sizes  # the check can fail


class _Allocated(TorchDispatchMode):
    """Adds up the bytes of all memory that operators take; what is given back is not taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and not one.is_meta:
                self.kept[one.untyped_storage().data_ptr()] = one.untyped_storage()
        return out

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())


def tiled(site: Site) -> Quantize | KeepDense:
    """Holds a weight as conversions do, with codes drawn at random."""
    decided = Policy.from_scratch(codebook_dim=8, codebook_bits=4).decide([site])[site.name]
    assert isinstance(decided, Quantize)
    return dataclasses.replace(decided, spec=dataclasses.replace(decided.spec, stages=4, tiled=True))


def test_a_folder_is_read_once_and_nothing_is_allocated_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summed up over the whole call, so that the peak cannot be more."""
    small = rpqfx.rpqify(llama(vocab_size=1024, hidden_size=256, intermediate_size=512), tiled)
    for weight in set(quantized_weights(small).values()):  # as codes are that were found, and not a seed
        weight.codes = weight.codes.flip(-1)
    small.save_pretrained(tmp_path)
    stored, read = safetensors.load_file(tmp_path / "model.safetensors"), list[int]()

    def counted(file: Any, offset: int, size: int) -> Tensor:
        read.append(size)
        return read_bytes(file, offset, size)

    monkeypatch.setattr("rpqfx.storage.container.read_bytes", counted)
    with _Allocated() as seen:
        again = type(small).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(small))
    assert sum(read) <= 1.01 * sum(tensor.nbytes for tensor in stored.values())  # frequencies, twice
    held = sum({id(tensor): tensor.nbytes for tensor in (*again.parameters(), *again.buffers())}.values())
    narrow = sum(tensor.nbytes for tensor in stored.values() if tensor.dtype in (torch.float16, torch.bfloat16))
    assert held <= seen.nbytes + 8192 and seen.nbytes - narrow <= 1.1 * held
    with _Allocated() as seen:
        type(small).from_pretrained(tmp_path, device_map={"": "cpu"})
    assert seen.nbytes - narrow > 1.1 * held  # where transformers reads the tensors; so the check can fail


def test_a_state_dict_of_a_folder_is_taken(tmp_path: Path) -> None:
    """As Trainer does when it resumes."""
    for name in ("tied decoder", "codes of two bytes, scales, signs", "keys and values"):
        small = MODELS[name]().eval()
        small.save_pretrained(tmp_path)
        other = copy.deepcopy(small)
        with torch.no_grad():
            for tensor in (*other.parameters(), *(m.stored_codes for m in quantized_weights(other).values())):
                tensor.zero_()
        found = other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
        assert found.unexpected_keys == []
        if name != "keys and values":
            assert torch.equal(logits(other), logits(small))
            again = copy.deepcopy(other)
            again.load_state_dict(small.state_dict())  # as ever
            assert torch.equal(logits(again), logits(small))
        else:
            assert torch.equal(other.model.embed_tokens.weight, small.model.embed_tokens.weight)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    rpqfx.rpqify(llama(), POLICY).save_pretrained(path, max_shard_size="20KB")
    return path


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)


def _without_a_shard(path: Path) -> None:
    sorted(path.glob("*.safetensors"))[1].unlink()


def _without_an_entry_of_the_index(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    last = max(said["weight_map"].values())
    said["weight_map"] = {name: file for name, file in said["weight_map"].items() if file != last}
    index.write_text(json.dumps(said))


def _with_anothers_shard(path: Path) -> None:
    rpqfx.rpqify(llama(), Policy.from_scratch(codebook_dim=8, codebook_bits=4, min_size=1024)).save_pretrained(
        path / "other", max_shard_size="20KB"
    )
    shards = sorted(path.glob("*.safetensors"))
    shutil.copy(sorted((path / "other").glob("*.safetensors"))[1], shards[1])


def _without_metadata(path: Path) -> None:
    for shard in path.glob("*.safetensors"):
        safetensors.save_file(safetensors.load_file(shard), shard, {"format": "pt"})


def _cut(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def _of_another_size(path: Path) -> None:
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**said, "vocab_size": 310}))


def _of_another_format(path: Path) -> None:
    said = json.loads((path / "config.json").read_text())
    said["quantization_config"]["format"] = 2
    (path / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: _flip(sorted(path.glob("*.safetensors"))[1]), "do not match its checksum"),
        (_without_a_shard, "00002-of-.*is missing"),
        (_without_an_entry_of_the_index, "which is not among its tensors"),
        (_with_anothers_shard, "00002-of-.*is of another model"),
        (_without_metadata, "not one that rpqfx.save wrote"),
        (_cut, "truncated"),
        (_of_another_size, r"from_pretrained made it \(310, 64\)"),
        (_of_another_format, "update rpqfx"),
    ],
    ids=["bit", "shard", "index", "other", "metadata", "cut", "size", "newer"],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(damage: Any, message: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    transformers.LlamaForCausalLM.from_pretrained(path)
    damage(path)
    with pytest.raises(FormatError, match=message):
        transformers.LlamaForCausalLM.from_pretrained(path)


def test_a_model_that_transformers_shares_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rpqfx.rpqify(llama(), POLICY).save_pretrained(tmp_path / "small")
    llama().save_pretrained(tmp_path / "dense")
    kind = type(llama())
    monkeypatch.setattr(kind, "_device_mesh", object(), raising=False)  # as a plan of tp_plan= leaves it
    for name, options in (("small", {}), ("dense", {"quantization_config": rpqfx.RPQConfig(bits_per_weight=4)})):
        with pytest.raises(InputError, match=r"tp_plan=.*know no codebooks.*parallelize_module"):
            kind.from_pretrained(tmp_path / name, **options)
    monkeypatch.undo()
    kind.from_pretrained(tmp_path / "small")


def test_a_model_that_could_not_come_back_is_not_saved(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(), POLICY)
    small.model.layers = small.model.layers[:1]  # and the config still says two
    with pytest.raises(RPQError, match="could not load this model again"):
        small.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_state_dict_that_is_not_the_models_is_not_saved(tmp_path: Path) -> None:
    small = rpqfx.rpqify(llama(), POLICY)
    state = small.state_dict()
    small.save_pretrained(tmp_path / "same", state_dict=state)
    small.save_pretrained(tmp_path / "equal", state_dict={name: tensor.clone() for name, tensor in state.items()})
    wrong = {**state, "model.norm.weight": state["model.norm.weight"] + 1}
    part = {name: tensor for name, tensor in state.items() if "norm" in name}
    for given, message in ((wrong, "model.norm.weight is not the model's"), (part, "without model.embed_tokens")):
        with pytest.raises(InputError, match=message):
            small.save_pretrained(tmp_path / "model", state_dict=given)
    assert not (tmp_path / "model").exists()


_WITHOUT = """
import sys
sys.modules["rpqfx"] = None  # importing it now fails, installed or not
import transformers
transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    for name in ("LlamaForCausalLM", "AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"):
        try:
            getattr(transformers, name).from_pretrained(folder)
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error), error
        else:
            raise SystemExit(f"{name} opened {folder}")
"""

_WITH = """
import sys
import torch
import {first}
import {second}
assert rpqfx.errors and "transformers.quantizers.auto" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(type(finder).__module__.startswith("rpqfx") for finder in sys.meta_path)
assert transformers.quantizers.auto.__loader__ is transformers.quantizers.auto.__spec__.loader
assert "arrival" not in type(transformers.quantizers.auto.__loader__).__module__
ids, wanted = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(ids).logits, wanted)
print(rpqfx.RPQConfig(3).quant_method)
"""


def test_without_this_library_a_folder_is_an_error_and_never_random_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("keys and values", "routed"):
        MODELS[name]().save_pretrained(tmp_path / name)
    done = forks.run(_WITHOUT, str(folder), str(tmp_path / "keys and values"), str(tmp_path / "routed"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("first", "second"), [("rpqfx", "transformers"), ("transformers", "rpqfx")])
def test_a_folder_is_opened_by_a_fresh_process(first: str, second: str, folder: Path, tmp_path: Path) -> None:
    torch.save((ids(), logits(transformers.LlamaForCausalLM.from_pretrained(folder))), tmp_path / "wanted")
    done = forks.run(_WITH.format(first=first, second=second), str(folder), str(tmp_path / "wanted"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["rpq"]


# ------------------------------------------------------------------------------------------- quantizing while loading


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    llama(num_hidden_layers=1).save_pretrained(path)
    return path


def test_weights_are_put_into_codebooks_as_they_come(dense: Path, tmp_path: Path) -> None:
    config = rpqfx.RPQConfig(bits_per_weight=5)
    small, info = transformers.LlamaForCausalLM.from_pretrained(
        dense, quantization_config=config, output_loading_info=True
    )
    assert {name: found for name, found in info.items() if found} == {}
    wanted = rpqfx.rpqify(llama(num_hidden_layers=1), Policy.pretrained(5)).eval()
    found, theirs = rpqfx.report(small), rpqfx.report(wanted)
    assert [site.spec for site in found.rewritten] == [site.spec for site in theirs.rewritten]
    assert found.bits_per_weight == theirs.bits_per_weight and found.after == theirs.after
    for ours, other in zip(found.rewritten, theirs.rewritten, strict=True):
        assert ours.error is not None and other.error is not None and ours.error < 1.2 * other.error
    assert small.lm_head.weight_rpq is small.model.embed_tokens.weight_rpq
    again = reopened(small, tmp_path)
    assert torch.equal(logits(again), logits(small))


def test_what_was_interrupted_while_loading_goes_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from rpqfx.integrations.kept import Kept

    save, saved = Kept.save, []

    def counted(self: Any, name: str, *args: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, *args)

    opened = transformers.AutoModelForCausalLM.from_pretrained
    config = rpqfx.RPQConfig(bits_per_weight=5, checkpoint=tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(Kept, "save", counted)
        with pytest.raises(KeyboardInterrupt):
            opened(dense, quantization_config=config)
    monkeypatch.setattr(Kept, "save", lambda self, name, *args: (saved.append(name), save(self, name, *args)))
    small = opened(dense, quantization_config=config)
    assert len(saved) == len(set(saved)) > 3
    wanted = opened(dense, quantization_config=rpqfx.RPQConfig(bits_per_weight=5))
    ours, theirs = small.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rpqfx.report(small) == rpqfx.report(wanted)
    assert "checkpoint" not in small.config.to_dict()["quantization_config"]
    small.save_pretrained(tmp_path / "small")
    assert "checkpoint" not in json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    changed = opened(dense)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(2)
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(FormatError, match=r"holds model\.layers\.0\.mlp\.up_proj\.weight of another model"):
        opened(tmp_path / "changed", quantization_config=config)
    with pytest.raises(FormatError, match="holds a loading of another model, policy or seed"):
        opened(dense, quantization_config=rpqfx.RPQConfig(bits_per_weight=4, checkpoint=tmp_path / "kept"))


def test_a_policy_says_how(dense: Path) -> None:
    policy = Policy(codebook_dim=8, codebook_bits=4, rules=(rpqfx.Rule("*.mlp.*", skip="they stay"),), min_size=1024)
    small = transformers.LlamaForCausalLM.from_pretrained(dense, quantization_config=rpqfx.RPQConfig(policy=policy))
    wanted = rpqfx.rpqify(llama(num_hidden_layers=1), policy).eval()
    assert torch.equal(logits(small), logits(wanted))
    left = rpqfx.RPQConfig(5, modules_to_not_convert=["mlp"], embedding_bits=None)
    small = transformers.LlamaForCausalLM.from_pretrained(dense, quantization_config=left)
    assert {name.split(".")[3] for name in quantized_weights(small)} == {"self_attn"}


def test_no_more_than_one_dense_weight_is_there(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rpqfx.integrations.quantizing import Quantizing

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("older ones read all tensors ahead")
    seen: list[weakref.ref[Tensor]] = []
    take = Quantizing._take

    def noting(self: Any, model: nn.Module, name: str, weight: Tensor) -> None:
        assert [ref for ref in seen if ref() is not None] == []
        seen.append(weakref.ref(weight))
        take(self, model, name, weight)

    monkeypatch.setattr(Quantizing, "_take", noting)
    policy = Policy(codebook_dim=8, codebook_bits=4, min_size=1024)
    transformers.LlamaForCausalLM.from_pretrained(dense, quantization_config=rpqfx.RPQConfig(policy=policy))
    assert len(seen) == 8


def test_what_the_checkpoint_lacks_is_drawn_dense(dense: Path) -> None:
    small, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense, quantization_config=rpqfx.RPQConfig(policy=POLICY_FIT), num_labels=50, output_loading_info=True
    )
    assert {*info["missing_keys"]} == {"score.weight"} and type(small.score) is nn.Linear
    reasons = {site.name: site.reason for site in rpqfx.report(small).skipped}
    assert reasons == {"score.weight": "it is not in the checkpoint, and was drawn"}


POLICY_FIT = Policy(codebook_dim=8, codebook_bits=4, min_size=1024)


def test_beside_what_is_done_there_is_one_dense_weight_at_a_time(tmp_path: Path) -> None:
    """A model three times as deep takes no more memory beside its codebooks and the pages of its files."""
    above = {}
    for layers in (1, 3):
        folder, made = tmp_path / str(layers), list[Any]()
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
        llama(**shape).bfloat16().save_pretrained(folder, max_shard_size="20KB")
        options = {"dtype": torch.float32, "quantization_config": rpqfx.RPQConfig(policy=POLICY_FIT)}
        most = peak(lambda: made.append(transformers.LlamaForCausalLM.from_pretrained(folder, **options)))  # noqa: B023
        held = {id(tensor): tensor.nbytes for tensor in (*made[0].parameters(), *made[0].buffers())}
        mapped = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        above[layers] = most - sum(held.values()) - mapped
    largest = 4 * 300 * 32  # bytes of the embedding, as it comes to its fit
    assert above[3] <= above[1] + 4096 and above[1] < 4 * largest


def test_options_that_cannot_be_followed(dense: Path) -> None:
    config = rpqfx.RPQConfig
    for make, message in (
        (lambda: config(), "needs a number of bits"),
        (lambda: config(17), "at most 16"),
        (lambda: config(3, bit=3), "no option 'bit'"),
        (lambda: config(3, policy=POLICY_FIT), "give one of them"),
        (lambda: config(policy=3), "is a Policy or its JSON"),
        (lambda: config(3, modules_to_not_convert="lm_head"), "a list of names"),
        (lambda: config(3, seed=-1), "seed"),
    ):
        with pytest.raises(PolicyError, match=message):
            make()
    for policy, message in (
        (POLICY, "draws codebooks anew"),
        (
            Policy(codebook_dim=8, codebook_bits=4, sharing="shape", min_size=1024),
            "convert the model with rpqfx.rpqify",
        ),
    ):
        with pytest.raises(PolicyError, match=message):
            transformers.LlamaForCausalLM.from_pretrained(dense, quantization_config=config(policy=policy))
    for asked in (config(3, seed=2), config(3, embedding_bits=None), config(policy=POLICY_FIT)):
        again = config.from_dict(asked.to_dict())
        assert again.to_dict() == asked.to_dict() and again.asked() == asked.asked()
    assert config(policy=POLICY_FIT).asked() == POLICY_FIT


def test_what_a_config_takes_is_shown() -> None:
    options = inspect.signature(rpqfx.RPQConfig).parameters
    assert list(options) == [
        "bits_per_weight", "embedding_bits", "modules_to_not_convert", "policy", "seed", "checkpoint"
    ]  # fmt: skip
    assert all(option.annotation is not option.empty for option in options.values())


def test_what_transformers_gives_a_config_is_taken_or_refused() -> None:
    config, values = rpqfx.RPQConfig, rpqfx.RPQConfig(3).to_dict()
    made, unused = config.from_dict(values, return_unused_kwargs=True, seed=5, revision="main")
    assert made.seed == 5 and unused == {"revision": "main"}
    for wrong in ({"bit": 3}, {"routing": {}}, {"version": "1"}):
        with pytest.raises(PolicyError, match=f"no option '{next(iter(wrong))}'"):
            config.from_dict({**values, **wrong})
    saved = config.of_saved(3.1, {"": "{}"}).to_dict()
    assert config.from_dict(saved).to_dict() == saved
    for wrong in ({"seed": 1}, {"checkpoint": "x"}, {"routing": []}, {"bits_per_weight": "3"}, {"format": "1"}):
        with pytest.raises(FormatError, match=next(iter(wrong))):
            config.from_dict({**saved, **wrong})


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub"])
def test_calls_have_the_signatures_of_the_methods_that_they_stand_for(name: str) -> None:
    dense = llama(num_hidden_layers=1)
    wanted, small = inspect.signature(getattr(dense, name)), rpqfx.rpqify(dense, POLICY)
    for one in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert inspect.signature(getattr(one, name)) == wanted


def test_push_to_hub_refuses_arguments_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="branch"):
        rpqfx.rpqify(llama(num_hidden_layers=1), POLICY).push_to_hub("somebody/model", branch="main")


# ------------------------------------------------------------------------------------------------------ the hub


def test_what_is_pushed_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the calls of the hub replaced: nothing is uploaded."""
    import huggingface_hub
    from transformers.utils import hub

    card = huggingface_hub.ModelCard("---\nlibrary_name: transformers\n---\n# Theirs\n")
    for place in (hub, transformers.modeling_utils):
        if hasattr(place, "create_and_tag_model_card"):
            monkeypatch.setattr(place, "create_and_tag_model_card", lambda *args, **kwargs: card)
        if hasattr(place, "create_repo"):
            monkeypatch.setattr(place, "create_repo", lambda *args, **kwargs: _Repo())
        if hasattr(place, "hf_api"):
            monkeypatch.setattr(place, "hf_api", _Repo)

    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> None:
        target = tmp_path / f"uploaded {len(list(tmp_path.iterdir()))}"
        shutil.copytree(working_dir, target)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "_upload_modified_files", upload)
    small = rpqfx.rpqify(llama(), POLICY).eval()
    small.push_to_hub("somebody/model")
    small.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="somebody/model")
    uploaded = sorted(tmp_path.glob("uploaded *"))
    assert len(uploaded) == 2
    for path in uploaded:
        text = (path / "README.md").read_text(encoding="utf-8")
        assert "# Theirs" in text and text.count("## Quantization: rpq") == 1
        assert torch.equal(logits(type(small).from_pretrained(path)), logits(small))


class _Repo:
    repo_id = "somebody/model"

    def create_repo(self, *args: Any, **kwargs: Any) -> _Repo:
        return self


@pytest.mark.parametrize("first", ["import rpqfx\nrpqfx.RPQConfig", "import rpqfx.integrations.saving", "import rpqfx"])
def test_it_is_registered_whichever_module_comes_first(first: str) -> None:
    table = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known"
    done = forks.run(f"{first}\n{table}\nprint(known['rpq'].__name__)")
    assert (done.returncode, done.stdout) == (0, "RPQQuantizer\n"), done.stderr
