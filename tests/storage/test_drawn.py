"""Codes that were drawn and never changed are in a file as their seed, all others as they are."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import CodebookSpec, Policy, Quantize, Recoding
from rpqfx.codebook.drawn_codes import VERSION
from rpqfx.errors import FormatError
from rpqfx.nn import RPQWeight, resize
from rpqfx.storage.container import open_container, writer_for
from rpqfx.storage.manifest_report import report_of
from rpqfx.storage.sealed_manifest import checksum, seal_of
from tests.models import quantized_weights

both_formats = pytest.mark.parametrize("suffix", [".rpq", ".safetensors"])
POLICIES = {
    "one stage": {}, "two stages": {"stages": 2}, "shared": {"sharing": "shape"}, "layer": {"sharing": "layer"},
    "factors": {"scale": True, "column_scale": True, "signs": True}, "wide": {"codebook_bits": 9},
    "few": {"codebook_bits": 1},
}  # fmt: skip


class Net(nn.Module):
    """A table that the head is tied to, a convolution, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 16, padding_idx=3)
        self.mix = nn.Conv1d(16, 32, 3, padding=1)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 600, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.mix(self.table(ids).mT).mT)))


def drawn(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    options = {"codebook_dim": 4, "codebook_bits": 4, "min_size": 256, "allow_growth": True, **options}
    return rpqfx.rpqify(Net(), Policy.from_scratch(**options))


def saved(model: nn.Module, suffix: str = ".rpq") -> bytes:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = io.BytesIO()
    file.name = f"m{suffix}"
    rpqfx.save(model, file)
    return file.getvalue()


def opened(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    held = open_container(io.BytesIO(content), "m.rpq")
    return json.loads(held.text), held.read(list(held.stored))


def loaded(content: bytes, build: Callable[[], nn.Module] = Net) -> nn.Module:
    return rpqfx.load(io.BytesIO(content), build)


def seeds_in(content: bytes) -> dict[str, list[int]]:
    """Stages that are seeds, by the names of the codes."""
    return {e["names"][0]: e["drawn"] for e in opened(content)[0]["tensors"] if "drawn" in e}


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    state = found.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert state[name].dtype == tensor.dtype and state[name].tolist() == tensor.tolist(), name


@both_formats
@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_a_model_is_saved_without_codes_and_comes_back(options: dict[str, Any], suffix: str) -> None:
    small = drawn(**options)
    content = saved(small, suffix)
    manifest, tensors = opened(content)
    weights = {f"{name}_rpq.codes": weight for name, weight in quantized_weights(small).items()}
    names = {name for entry in manifest["tensors"] if "drawn" in entry for name in entry["names"]}
    assert names == set(weights) and len(names) == 4
    for name, stages in seeds_in(content).items():
        assert stages == list(range(weights[name].spec.stages))
        assert int.from_bytes(bytes(tensors[name][1:9].tolist()), "little") == weights[name].code_seed
        assert tensors[name].nbytes == 14
    again = loaded(content)
    assert_same(again, small)
    made = rpqfx.report(small)
    assert 8 * sum(tensor.nbytes for name, tensor in tensors.items() if "_rpq" in name) == made.stored_bits
    assert report_of(manifest).to_dict() == made.to_dict() == rpqfx.report(again).to_dict()
    assert opened(saved(again, suffix))[0] == manifest


@pytest.mark.parametrize("tiled", [False, True])
def test_tiles_come_back(tiled: bool) -> None:
    def held(site: Any) -> Any:
        answer = Policy.from_scratch(codebook_dim=4, codebook_bits=4, stages=2, sharing="layer", min_size=256)(site)
        if not isinstance(answer, Quantize):
            return answer
        return Quantize(CodebookSpec(**{**answer.spec.to_dict(), "tiled": tiled}), answer.split, "random")

    small = rpqfx.rpqify(Net(), held)
    content = saved(small)
    assert len(seeds_in(content)) == 3
    assert_same(loaded(content), small)


def test_the_file_is_smaller_by_the_codes() -> None:
    small = drawn(codebook_bits=4, codebook_dim=2)
    seed = len(saved(small))
    for weight in set(quantized_weights(small).values()):
        weight.codes = weight.codes.flip(-1)
    codes = sum(weight.codes.numel() // 2 for weight in set(quantized_weights(small).values()))
    assert codes - 400 < len(saved(small)) - seed < codes and codes > 2500  # seeds and what is said of them


def shifted(small: nn.Module) -> None:
    weight = small.down.weight_rpq
    weight.codes = weight.codes.int().roll(1, -1)


def one_code(small: nn.Module) -> None:
    small.down.weight_rpq.codes[-1, -1, -1] ^= 1


def by_copy(small: nn.Module) -> None:
    small.down.weight_rpq.codes.copy_(small.down.weight_rpq.codes.flip(-1))


def by_data(small: nn.Module) -> None:
    small.down.weight_rpq._buffers["codes"].data[..., :2] ^= 1


def by_state_dict(small: nn.Module) -> None:
    state = small.state_dict()
    state["down.weight_rpq.codes"] = state["down.weight_rpq.codes"].flip(-1)
    small.load_state_dict(state)


def without_a_seed(small: nn.Module) -> None:
    small.down.weight_rpq.code_seed = None


def with_another_seed(small: nn.Module) -> None:
    small.down.weight_rpq.code_seed += 1


CHANGES = (shifted, one_code, by_copy, by_data, by_state_dict, without_a_seed, with_another_seed)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_codes_is_noticed(change: Callable[[nn.Module], None]) -> None:
    small = drawn()
    change(small)
    content = saved(small)
    assert seeds_in(content) == {"table.weight_rpq.codes": [0], "mix.weight_rpq.codes": [0]}
    assert_same(loaded(content), small)
    assert rpqfx.report(small).to_dict() == report_of(opened(content)[0]).to_dict()


def test_a_stage_that_was_learned_is_stored_and_the_other_is_a_seed() -> None:
    small = drawn(stages=2)
    for weight in set(quantized_weights(small).values()):
        weight.codes = torch.stack([weight.codes[0].flip(-1), weight.codes[1]])
    content = saved(small)
    assert set(map(tuple, seeds_in(content).values())) == {(1,)}
    again = loaded(content)
    assert_same(again, small)
    table = rpqfx.report(small).sites[0]
    assert table.drawn_stages == 1 and table.stored_code_bits == 8 * 14 + 600 * 4 * 4
    assert "; random codes of 3 sites as a seed\n" in str(rpqfx.report(small))
    assert saved(again) == content


@pytest.mark.parametrize("recipe", ["latent", "sketch"])
def test_codes_that_recoding_learned_are_stored(recipe: str) -> None:
    small = drawn(stages=1 + (recipe == "sketch"), sharing="layer")
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    recode = Recoding(small, optimizer, steps=10, recipe=recipe)
    for _ in range(10):
        small(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
        recode.step()
    recode.finish()
    content = saved(small)
    stages = {"latent": [], "sketch": [[1]] * 3}[recipe]
    assert list(seeds_in(content).values()) == stages
    assert_same(loaded(content), small)


def test_weights_that_share_a_codebook_have_second_stages_of_their_own() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.Linear(32, 64))
    small = rpqfx.rpqify(
        net, Policy.from_scratch(codebook_dim=4, codebook_bits=4, stages=2, sharing="shape", min_size=256)
    )
    assert small[0].weight_rpq.codebooks is small[1].weight_rpq.codebooks
    Recoding(small, torch.optim.SGD(small.parameters(), 0.1), steps=10, recipe="sketch")
    assert not torch.equal(small[0].weight_rpq.codes[1], small[1].weight_rpq.codes[1])


# --------------------------------------------------------------------------------------------- where models go


def test_a_state_dict_brings_its_seeds() -> None:
    small, other = drawn(0), drawn(1)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert seeds_in(saved(other)) == seeds_in(saved(small)) and len(seeds_in(saved(small))) == 3
    assert_same(loaded(saved(other)), small)


def test_a_state_dict_without_metadata_brings_codes_that_are_stored() -> None:
    small, other = drawn(0), drawn(1)
    other.load_state_dict(dict(small.state_dict()))
    content = saved(other)
    assert seeds_in(content) == {} and len(content) > len(saved(small))
    assert_same(loaded(content), small)
    same = drawn(0)
    same.load_state_dict(dict(small.state_dict()))
    assert len(seeds_in(saved(same))) == 3


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "1", True, None])
def test_metadata_that_holds_no_seed_is_none(seed: object) -> None:
    small, other = drawn(0), drawn(1)
    state = small.state_dict()
    state._metadata["down.weight_rpq"]["code_seed"] = seed
    other.load_state_dict(state)
    assert_same(loaded(saved(other)), small)


def test_a_part_of_a_state_dict_leaves_the_rest() -> None:
    small, other = drawn(0), drawn(1)
    state = small.state_dict()
    del state["down.weight_rpq.codes"]
    other.load_state_dict(state, strict=False)
    assert len(seeds_in(saved(other))) == 3
    assert other.down.weight_rpq.code_seed == drawn(1).down.weight_rpq.code_seed != small.down.weight_rpq.code_seed


def through_parameters(small: nn.Module) -> nn.Module:
    for weight in set(quantized_weights(small).values()):
        weight.hold_codes_as_parameters()
        assert weight.drawn_stages() == (0,)
        weight.hold_codes_as_buffers()
    return small


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda small: pickle.loads(pickle.dumps(small)),
    "dtype": lambda small: small.double(), "half": lambda small: small.half(), "compiled": torch.compile,
    "parameters": through_parameters, "averaged": lambda small: torch.optim.swa_utils.AveragedModel(small).module,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_seeds_go_where_the_model_goes(way: Callable[[nn.Module], nn.Module]) -> None:
    small = drawn()
    wanted = seeds_in(saved(small))
    assert seeds_in(saved(way(small))) == wanted and len(wanted) == 3


def test_a_model_that_is_materialized_draws_a_seed() -> None:
    with torch.device("meta"):
        small = rpqfx.rpqify(
            Net(), Policy.from_scratch(codebook_dim=4, codebook_bits=4, min_size=256, allow_growth=True)
        )
    assert not any(weight.drawn_stages() for weight in quantized_weights(small).values())
    torch.manual_seed(0)
    rpqfx.materialize(small)
    content = saved(small)
    assert len(seeds_in(content)) == 3
    assert_same(loaded(content), small)


def test_a_table_that_was_resized_is_stored() -> None:
    small = drawn()
    weight: RPQWeight = small.table.weight_rpq
    resize.resize_rows(weight, weight()[:590])
    assert weight.drawn_stages() == () and small.mix.weight_rpq.drawn_stages() == (0,)


def test_a_pickle_from_before_there_were_seeds_is_stored() -> None:
    small = drawn()
    for weight in set(quantized_weights(small).values()):
        del weight.__dict__["code_seed"]
    content = saved(small)
    assert seeds_in(content) == {}
    assert_same(loaded(content), small)


# --------------------------------------------------------------------------------------- what cannot be right


def changed(change: Callable[[dict[str, Any], dict[str, Any], dict[str, Tensor]], None], **options: Any) -> bytes:
    """A file whose manifest or tensors were changed, under seals that fit: the entry of ``down``, the manifest, all."""
    manifest, tensors = opened(saved(drawn(**options)))
    entry = next(entry for entry in manifest["tensors"] if entry["names"] == ["down.weight_rpq.codes"])
    change(entry, manifest, tensors)
    manifest["checksum"] = checksum(tensors)
    text = json.dumps(manifest)
    path = Path("m.rpq")
    file = io.BytesIO()
    assert writer_for(path.name)
    torch.save({"rpqfx": text, "seal": seal_of(text), "tensors": tensors}, file)
    return file.getvalue()


def byte(at: int, value: int) -> Callable[..., None]:
    def change(entry: Any, manifest: Any, tensors: dict[str, Tensor]) -> None:
        held = tensors["down.weight_rpq.codes"].clone()
        held[at] = value
        tensors["down.weight_rpq.codes"] = held

    return change


def said(stages: Any) -> Callable[..., None]:
    return lambda entry, manifest, tensors: entry.update(drawn=stages)


def entries_of_the_shape(entry: Any, manifest: Any, tensors: Any) -> None:
    entry["shape"][2] = 2**40
    for site in manifest["sites"]:
        if site["names"] == ["down.weight"]:
            site["spec"]["num_vectors"], site["layout"]["shape"] = 2**40, [16, 2**40]


def of_a_bias(entry: Any, manifest: Any, tensors: Any) -> None:
    bias = next(one for one in manifest["tensors"] if one["names"] == ["down.bias"])
    bias["drawn"], bias["dtype"], bias["shape"] = entry["drawn"], "uint8", entry["shape"]
    bias["packed"], bias["requires_grad"] = entry["packed"], False
    tensors["down.bias"] = tensors["down.weight_rpq.codes"].clone()


def a_wider_dtype(entry: Any, manifest: Any, tensors: Any) -> None:
    entry["dtype"] = "int64"


WRONG: dict[str, tuple[Callable[..., None], str]] = {
    "another seed": (byte(3, 77), "others are drawn than were saved"),
    "no seed": (byte(8, 255), "the seed of its codes is none"),
    "another sum": (byte(10, 77), "others are drawn than were saved"),
    "a newer version": (byte(0, VERSION + 1), r"seed of version 2 of their generator.*update rpqfx"),
    "other stages": (byte(13, 2), "14 bytes are no codes"),
    "no stages": (said([]), "no right value at tensors"),
    "a word": (said("0"), "no right value at tensors"),
    "a stage too many": (said([0, 1]), "names no stages of codes"),
    "a stage twice": (said([0, 0]), "names no stages of codes"),
    "a seed alone": (lambda entry, *_: entry.pop("packed"), "names no stages of codes"),
    "other codes": (lambda entry, *_: entry.pop("drawn"), "cannot be unpacked: 128 codes of 4 bits take 64 bytes"),
    "a bias": (of_a_bias, "down.bias, which is no codes, is drawn from a seed"),
    "a dtype": (a_wider_dtype, "has codes of torch.int64"),
    "a size of its own": (entries_of_the_shape, r"build\(\) made it"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_manifest_that_cannot_be_right_is_refused(change: Callable[..., None], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        loaded(changed(change))


def test_an_earlier_file_has_its_codes() -> None:
    """Codes that were drawn are read as ever where they are stored."""

    def stored(entry: Any, manifest: Any, tensors: dict[str, Tensor]) -> None:
        del entry["drawn"]
        codes = drawn().down.weight_rpq.codes.flatten()
        tensors["down.weight_rpq.codes"] = codes[::2] | codes[1::2] << 4

    again = loaded(changed(stored))
    assert_same(again, drawn())
