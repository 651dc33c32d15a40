"""A saved model returns identical, whole or not at all, and makes no dense weight on its way back."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import CodebookSpec, Policy, Quantize, Rule
from rpqfx.errors import CodeError, FormatError, InputError, RPQError
from rpqfx.nn import RPQLinear
from rpqfx.storage import serialize
from rpqfx.storage.container import open_container
from rpqfx.storage.sealed_manifest import FORMAT_VERSION, checksum, seal_of
from tests import forks
from tests.models import BY_NAME, CASES, GPT, MLP, SMALL, Case, assert_outputs, quantized_weights

SUFFIXES = [".rpq", ".safetensors"]
both_formats = pytest.mark.parametrize("suffix", SUFFIXES, ids=["torch", "safetensors"])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))


@pytest.fixture(autouse=True)
def _safetensors_if_needed(request: pytest.FixtureRequest) -> None:
    if "safetensors" in str(getattr(request.node, "callspec", None) and request.node.callspec.params.get("suffix")):
        pytest.importorskip("safetensors")


def small_mlp() -> nn.Module:
    torch.manual_seed(0)
    return rpqfx.rpqify(MLP(), SMALL)


def assert_identical(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert {n: p.requires_grad for n, p in found.named_parameters()} == {
        n: p.requires_grad for n, p in wanted.named_parameters()
    }


def contents(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    """Manifest, seal and stored tensors of a file."""
    with open(path, "rb") as file:
        held = open_container(file, path.name)
        return held.text, held.seal, held.read(list(held.stored))


# ------------------------------------------------------------------------------------------------ there and back


@both_formats
@every_case
def test_a_loaded_model_returns_identical_outputs(case: Case, suffix: str, tmp_path: Path):
    small = rpqfx.rpqify(case.model(torch.float32), case.policy).eval()
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", case.build).eval()
    assert_identical(again, small)
    args, kwargs = case.arguments(torch.float32)
    assert_outputs(again(*args, **kwargs), small(*args, **kwargs), 0)
    assert len(list(again.parameters())) == len(list(small.parameters()))  # ties
    assert str(rpqfx.report(again)) == str(rpqfx.report(small))
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]


@both_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_return_as_they_were(dtype: torch.dtype, suffix: str, tmp_path: Path):
    small = rpqfx.rpqify(GPT().to(dtype), SMALL)
    rpqfx.save(small, tmp_path / f"m{suffix}")
    assert_identical(rpqfx.load(tmp_path / f"m{suffix}", GPT), small)


@both_formats
def test_every_option_of_a_spec_returns(suffix: str, tmp_path: Path):
    policy = Policy(
        codebook_dim=4, codebook_bits=2, min_size=64, stages=2, scale=True, signs=True, grad_scale="sqrt",
        sharing="role", column_scale=True, allow_growth=True,
        rules=(Rule("tok", sharing="layer"), Rule("*.fc2", split="column")),
    )  # fmt: skip
    small = rpqfx.rpqify(GPT(), policy)
    for weight in quantized_weights(small).values():
        weight.column_scale.data.uniform_(0.5, 2)
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", GPT)
    assert_identical(again, small)
    held, wanted = quantized_weights(again), quantized_weights(small)
    for name, weight in wanted.items():
        assert (held[name].spec, held[name].layout, held[name].std) == (weight.spec, weight.layout, weight.std)
    books = [held[f"blocks.{i}.qkv.weight"].codebooks for i in range(2)]
    assert books[0] is books[1]


@both_formats
def test_plans_return_with_tied_layers_and_shared_codebooks(suffix: str, tmp_path: Path):
    rules = (Rule("tok", plan="lookup"), Rule("blocks.1.*", plan="dequantize"))
    small = rpqfx.rpqify(GPT(), Policy(codebook_dim=4, codebook_bits=2, min_size=64, sharing="role", rules=rules))
    small.blocks[0].qkv.weight_rpq.plan = "lookup"  # since the rewrite
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", GPT)
    plans = {name: weight.plan for name, weight in quantized_weights(again).items()}
    assert plans == {name: weight.plan for name, weight in quantized_weights(small).items()}
    assert set(plans.values()) == {"auto", "dequantize", "lookup"}
    assert again.tok.weight_rpq is again.head.weight_rpq
    assert str(rpqfx.report(again)) == str(rpqfx.report(small))


def test_a_file_from_before_there_were_factors_of_columns_loads(tmp_path: Path):
    small = small_mlp().eval()
    rpqfx.save(small, tmp_path / "m.rpq")
    manifest = json.loads(torch.load(tmp_path / "m.rpq", weights_only=True)["rpqfx"])
    held = [values["spec"] for values in (*manifest["sites"], *manifest["records"]) if values["spec"] is not None]
    assert held
    for spec in held:
        del spec["column_scale_group"]
    rewrite_manifest(tmp_path / "m.rpq", sites=manifest["sites"], records=manifest["records"])
    again = rpqfx.load(tmp_path / "m.rpq", MLP).eval()
    assert {weight.spec.column_scale_group for weight in quantized_weights(again).values()} == {0}
    assert_identical(again, small)


@both_formats
def test_sixteen_bit_codes_return(suffix: str, tmp_path: Path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(70_000, 4))

    policy = Policy(codebook_dim=4, codebook_bits=16, init="random", allow_growth=True)
    small = rpqfx.rpqify(build(), policy)
    assert small[0].weight_rpq.codes.dtype == torch.uint16
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", build)
    assert torch.equal(again[0].weight_rpq.codes.long(), small[0].weight_rpq.codes.long())
    ids = torch.arange(0, 70_000, 777)
    assert torch.equal(again(ids), small(ids))


class Keeper(nn.Module):
    """Has tensors that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("hidden", torch.arange(4.0), persistent=False)
        self.plain = torch.full((3,), 7.0)
        self.same = self.plain
        self.scalar = torch.tensor(2.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scalar + self.hidden.sum() + self.plain[0]


@both_formats
def test_hidden_buffers_and_plain_tensors_return(suffix: str, tmp_path: Path):
    small = rpqfx.rpqify(Keeper(), SMALL)
    small.hidden += 1
    small.plain *= 2
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", Keeper)
    assert torch.equal(again.hidden, small.hidden) and torch.equal(again.plain, small.plain)
    assert again.same is again.plain and "hidden" not in again.state_dict()
    x = torch.randn(2, 16)
    assert torch.equal(again(x), small(x))


@both_formats
def test_frozen_parameters_return_frozen(suffix: str, tmp_path: Path):
    case = BY_NAME["frozen"]
    small = rpqfx.rpqify(case.model(torch.float32), SMALL)
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", MLP)  # whatever build() says of them
    assert_identical(again, small)
    assert not again.fc1.weight_rpq.codebooks.requires_grad and again.fc2.weight_rpq.codebooks.requires_grad


@both_formats
def test_a_loaded_model_trains_and_is_saved_again(suffix: str, tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / f"a{suffix}")
    again = rpqfx.load(tmp_path / f"a{suffix}", MLP)
    again(torch.randn(3, 12)).sum().backward()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter -= 0.1 * parameter.grad
    rpqfx.save(again, tmp_path / f"b{suffix}")
    assert_identical(rpqfx.load(tmp_path / f"b{suffix}", MLP), again)


def test_layers_built_by_hand_are_saved_and_loaded_into_the_dense_model(tmp_path: Path):
    small = nn.Sequential(RPQLinear(16, 64, codebook_bits=4, codebook_dim=4))
    rpqfx.save(small, tmp_path / "m.rpq")
    assert_identical(rpqfx.load(tmp_path / "m.rpq", lambda: nn.Sequential(nn.Linear(16, 64))), small)


def test_the_two_formats_hold_the_same(tmp_path: Path):
    pytest.importorskip("safetensors")
    small = rpqfx.rpqify(GPT(), SMALL)
    loaded = []
    for suffix in SUFFIXES:
        rpqfx.save(small, tmp_path / f"m{suffix}")
        loaded.append(rpqfx.load(tmp_path / f"m{suffix}", GPT))
    assert_identical(*loaded)


# ------------------------------------------------------------------------------------------------- what a file is


def test_a_torch_file_is_plain_tensors_under_their_names(tmp_path: Path):
    small = rpqfx.rpqify(GPT(), SMALL)
    rpqfx.save(small, tmp_path / "m.rpq")
    held = torch.load(tmp_path / "m.rpq", weights_only=True)
    names = {n for n, _ in small.named_parameters()} | {n for n, _ in small.named_buffers()}
    assert set(held["tensors"]) == names and all(type(t) is Tensor for t in held["tensors"].values())
    manifest = json.loads(held["rpqfx"])
    assert manifest["version"] == FORMAT_VERSION == 1
    sites = {tuple(site["names"]): site for site in manifest["sites"]}
    assert ("tok.weight", "head.weight") in sites
    spec = CodebookSpec.from_dict(sites["blocks.0.qkv.weight",]["spec"])
    assert spec == quantized_weights(small)["blocks.0.qkv.weight"].spec


def test_a_safetensors_file_is_read_by_safetensors(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    small = small_mlp()
    rpqfx.save(small, tmp_path / "m.safetensors")
    held = safetensors.load_file(tmp_path / "m.safetensors")
    assert torch.equal(held["fc1.weight_rpq.codebooks"], small.fc1.weight_rpq.codebooks)


@both_formats
def test_a_file_is_as_small_as_the_report_says(suffix: str, tmp_path: Path):
    torch.manual_seed(0)
    rules = (Rule("0", codebook_bits=5, scale=True, signs=True), Rule("1", codebook_bits=11))
    policy = Policy(codebook_dim=4, codebook_bits=9, sharing="shape", init="random", rules=rules, allow_growth=True)
    shapes = ((252, 1001), (256, 2048), (1000, 900), (1000, 900))
    small = rpqfx.rpqify(nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes)), policy)
    with torch.no_grad():
        small[3].weight_rpq.codebooks.copy_(small[3].weight_rpq.codebooks.half())
    assert small[2].weight_rpq.codebooks is small[3].weight_rpq.codebooks
    rpqfx.save(small, tmp_path / f"m{suffix}")
    made, (text, _, tensors) = rpqfx.report(small), contents(tmp_path / f"m{suffix}")
    assert 8 * sum(tensor.nbytes for tensor in tensors.values()) == made.stored_bits < 0.75 * 8 * made.after
    container = 300 * (len(tensors) + 5) + 2 * len(text)  # names, alignment; the manifest may be escaped
    assert 0 < (tmp_path / f"m{suffix}").stat().st_size - made.stored_bits / 8 < container < 0.02 * made.stored_bits


@both_formats
@pytest.mark.parametrize("bits", [1, 3, 8, 12, 16])
def test_codes_take_the_bits_that_they_need(bits: int, suffix: str, tmp_path: Path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(70_001, 4))

    small = rpqfx.rpqify(build(), Policy(codebook_dim=4, codebook_bits=bits, init="random", allow_growth=True))
    small[0].weight_rpq.codes = small[0].weight_rpq.codes.int().flip(-1)  # not as they were drawn
    rpqfx.save(small, tmp_path / f"m{suffix}")
    text, _, tensors = contents(tmp_path / f"m{suffix}")
    entry = next(e for e in json.loads(text)["tensors"] if e["names"][0].endswith("codes"))
    assert entry["packed"] == {"bits": bits, "entries": 2**bits} and entry["shape"] == [1, 1, 70_001]
    assert tensors["0.weight_rpq.codes"].nbytes == -(-70_001 * bits // 8)
    again = rpqfx.load(tmp_path / f"m{suffix}", build)
    assert again[0].weight_rpq.codes.dtype == small[0].weight_rpq.codes.dtype
    assert again[0].weight_rpq.codes.tolist() == small[0].weight_rpq.codes.tolist()


@both_formats
def test_floats_that_lose_nothing_are_stored_in_two_bytes(suffix: str, tmp_path: Path):
    small = rpqfx.rpqify(MLP(), Policy(codebook_dim=4, codebook_bits=2, min_size=64, scale=True, allow_growth=True))
    first, second = small.fc1.weight_rpq, small.fc2.weight_rpq
    with torch.no_grad():
        first.codebooks.copy_(first.codebooks.half())
        first.codebooks.view(-1)[:3] = torch.tensor([-0.0, torch.inf, -torch.inf])
        second.codebooks.copy_(second.codebooks.bfloat16()).view(-1)[0] = 2.0**100
        first.scale.fill_(-1.5)
        small.fc1.bias.fill_(1)
    first.register_parameter("more", nn.Parameter(torch.ones(3)))  # as the weight's others, whatever it is for
    rpqfx.save(small, tmp_path / f"m{suffix}")
    text, _, tensors = contents(tmp_path / f"m{suffix}")
    stored = {e["names"][0]: e["stored"] for e in json.loads(text)["tensors"] if "stored" in e}
    assert stored == {name: str(tensors[name].dtype).split(".")[1] for name in stored} == {
        "fc1.weight_rpq.codebooks": "float16", "fc1.weight_rpq.scale": "float16", "fc1.weight_rpq.more": "float16",
        "fc2.weight_rpq.codebooks": "bfloat16",
    }  # fmt: skip
    assert tensors["fc1.bias"].dtype == torch.float32  # of the model, not of a quantized weight
    del first.more
    rpqfx.save(small, tmp_path / f"m{suffix}")
    again = rpqfx.load(tmp_path / f"m{suffix}", MLP)
    assert_identical(again, small)
    ours, theirs = again.fc1.weight_rpq.codebooks, first.codebooks
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)) and type(ours) is nn.Parameter
    assert str(rpqfx.report(again)) == str(rpqfx.report(small))


def test_two_files_of_one_model_are_the_same(tmp_path: Path):
    small = small_mlp()
    for name in ("a.rpq", "b.rpq"):
        rpqfx.save(small, tmp_path / name)
    assert (tmp_path / "a.rpq").read_bytes() == (tmp_path / "b.rpq").read_bytes()


def test_build_runs_on_the_meta_device_and_makes_no_dense_weight(tmp_path: Path):
    rpqfx.save(rpqfx.rpqify(GPT(), SMALL), tmp_path / "m.rpq")
    devices: list[str] = []

    def build() -> nn.Module:
        model = GPT()
        devices.extend(str(t.device) for t in (*model.parameters(), *model.buffers()))
        return model

    again = rpqfx.load(tmp_path / "m.rpq", build)
    assert set(devices) == {"meta"} and len(devices) > 20
    assert {str(t.device) for t in (*again.parameters(), *again.buffers())} == {"cpu"}


def test_no_tensor_of_a_weights_size_is_allocated(tmp_path: Path):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.is_floating_point():
                    Largest.elements = max(Largest.elements, leaf.numel())
            return result

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 1024))

    rpqfx.save(rpqfx.rpqify(build(), Policy.from_scratch(codebook_dim=32, codebook_bits=4)), tmp_path / "m.rpq")
    with Largest():
        rpqfx.load(tmp_path / "m.rpq", build)
    assert 1024 <= Largest.elements <= 16 * 1024
    with Largest():
        build()
    assert Largest.elements == 512 * 1024  # the check can fail


class Computes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rates = [float(x) for x in torch.linspace(0, 1, 3)]
        self.fc, self.rate = nn.Linear(16, 16), rates[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.rate


def test_a_build_that_computes_with_values_says_how_to_build_it(tmp_path: Path):
    small = rpqfx.rpqify(Computes(), SMALL)
    rpqfx.save(small, tmp_path / "m.rpq")
    with pytest.raises(FormatError, match="pass build_device='cpu'"):
        rpqfx.load(tmp_path / "m.rpq", Computes)
    assert_identical(rpqfx.load(tmp_path / "m.rpq", Computes, build_device="cpu"), small)


# ------------------------------------------------------------------------------------------------- damaged files


def saved(folder: Path, suffix: str) -> bytes:
    path = folder / f"whole{suffix}"
    rpqfx.save(small_mlp(), path)
    return path.read_bytes()


def forbidden() -> nn.Module:
    raise AssertionError("a damaged file is refused before anything is built")


@both_formats
def test_a_file_that_is_cut_anywhere_is_refused(suffix: str, tmp_path: Path):
    whole = saved(tmp_path, suffix)
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 4, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"cut\.\w+ (is truncated|was altered)"):
            rpqfx.load(path, forbidden)


@both_formats
def test_a_file_with_one_flipped_byte_is_refused_or_means_the_same(suffix: str, tmp_path: Path):
    whole = saved(tmp_path, suffix)
    wanted = small_mlp()
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        path = tmp_path / f"flipped{suffix}"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = rpqfx.load(path, MLP)
        except FormatError as error:
            assert "flipped" in str(error)
            refused += 1
        else:  # padding between records, a time stamp
            assert_identical(found, wanted)
            assert str(rpqfx.report(found)) == str(rpqfx.report(wanted))
    assert refused > 75


@both_formats
def test_every_flipped_byte_of_a_tensor_is_noticed(suffix: str, tmp_path: Path):
    whole = saved(tmp_path, suffix)
    bias = small_mlp().fc1.bias.detach()
    data = bytes(bias.view(torch.uint8).tolist())
    at = whole.index(data)
    for place in range(at, at + len(data), 5):
        path = tmp_path / f"flipped{suffix}"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FormatError):
            rpqfx.load(path, forbidden)


def rewrite_manifest(path: Path, sealed: bool = True, **changes: Any) -> None:
    held = torch.load(path, weights_only=True)
    text = json.dumps({**json.loads(held["rpqfx"]), **changes})
    torch.save({**held, "rpqfx": text, "seal": seal_of(text) if sealed else held["seal"]}, path)


def test_a_newer_file_is_refused_as_newer(tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    rewrite_manifest(tmp_path / "m.rpq", version=FORMAT_VERSION + 1)
    with pytest.raises(FormatError, match=r"is of format 2, newer than this library reads \(1\); update rpqfx"):
        rpqfx.load(tmp_path / "m.rpq", forbidden)


def test_codes_out_of_range_do_not_come_out_of_a_file(tmp_path: Path):
    """Three entries take two bits, which have room for a fourth."""
    small = nn.Sequential(RPQLinear(16, 64, codebook_bits=2, codebook_dim=4))
    small[0].weight_rpq.codes = small[0].weight_rpq.codes.flip(-1)  # not as they were drawn
    rpqfx.save(small, tmp_path / "m.rpq")
    held = torch.load(tmp_path / "m.rpq", weights_only=True)
    tensors = json.loads(held["rpqfx"])["tensors"]
    next(entry for entry in tensors if "packed" in entry)["packed"]["entries"] = 3
    rewrite_manifest(tmp_path / "m.rpq", tensors=tensors)
    with pytest.raises(FormatError, match=r"holds 0\.weight_rpq\.codes, which cannot be unpacked: codes of 0 to 3"):
        rpqfx.load(tmp_path / "m.rpq", forbidden)


def test_packed_codes_of_another_length_are_refused(tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    tensors = json.loads(torch.load(tmp_path / "m.rpq", weights_only=True)["rpqfx"])["tensors"]
    next(entry for entry in tensors if "packed" in entry)["shape"][-1] += 8
    rewrite_manifest(tmp_path / "m.rpq", tensors=tensors)
    with pytest.raises(FormatError, match=r"codes, which cannot be unpacked: \d+ codes of \d bits take"):
        rpqfx.load(tmp_path / "m.rpq", forbidden)


@pytest.mark.parametrize("of", ["sites", "records"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiled": True}, "tiles hold codes of at most 16 entries, of two stages or more"),
        ({"codebook_dim": 5}, "codebook_dim 5 does not divide"),
        ({"num_codebooks": 5}, "5 codebooks cannot be shared evenly"),
        ({"column_scale_group": 5}, "column_scale_group is 0 or how many"),
    ],
)
def test_codebooks_that_cannot_be_are_refused(of: str, changes: dict[str, Any], message: str, tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    held = json.loads(torch.load(tmp_path / "m.rpq", weights_only=True)["rpqfx"])[of]
    next(values["spec"] for values in held if values["spec"] is not None).update(changes)
    rewrite_manifest(tmp_path / "m.rpq", **{of: held})
    with pytest.raises(FormatError, match=f"has codebooks that cannot be: {message}"):
        rpqfx.load(tmp_path / "m.rpq", forbidden)


def test_codebooks_whose_entries_are_no_power_of_two_return(tmp_path: Path):
    torch.manual_seed(0)
    layer = nn.Linear(16, 64, bias=False)
    policy = lambda site: Quantize(CodebookSpec(64, 16, 4, entries=5))  # noqa: E731
    small = rpqfx.rpqify(nn.Sequential(layer), policy)
    rpqfx.save(small, tmp_path / "m.rpq")
    assert contents(tmp_path / "m.rpq")[2]["0.weight_rpq.codes"].nbytes == 4 * 64 * 3 // 8
    assert_identical(rpqfx.load(tmp_path / "m.rpq", lambda: nn.Sequential(nn.Linear(16, 64, bias=False))), small)


def test_a_manifest_without_its_seal_is_refused(tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    rewrite_manifest(tmp_path / "m.rpq", sealed=False, notes=["mine"])
    with pytest.raises(FormatError, match="was altered: its manifest does not match its seal"):
        rpqfx.load(tmp_path / "m.rpq", forbidden)


def test_exchanged_tensors_are_refused(tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    held = torch.load(tmp_path / "m.rpq", weights_only=True)
    held["tensors"]["fc1.bias"] = held["tensors"]["fc1.bias"] + 1
    torch.save(held, tmp_path / "m.rpq")
    with pytest.raises(FormatError, match="was altered: its tensors do not match its checksum"):
        rpqfx.load(tmp_path / "m.rpq", forbidden)


def test_foreign_files_are_refused_as_foreign(tmp_path: Path):
    torch.save(MLP().state_dict(), tmp_path / "foreign.rpq")
    with pytest.raises(FormatError, match=r"is a torch file, but not one that rpqfx\.save wrote"):
        rpqfx.load(tmp_path / "foreign.rpq", forbidden)
    torch.save([1, 2], tmp_path / "foreign.rpq")
    with pytest.raises(FormatError, match="not one that"):
        rpqfx.load(tmp_path / "foreign.rpq", forbidden)
    for data in (b"GIF89a nothing of ours", b"PK\x03\x04 half a zip"):
        (tmp_path / "foreign.rpq").write_bytes(data)
        with pytest.raises(FormatError, match="truncated, altered or no rpqfx file"):
            rpqfx.load(tmp_path / "foreign.rpq", forbidden)
    with zipfile.ZipFile(tmp_path / "foreign.rpq", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(FormatError, match="truncated, altered or no rpqfx file"):
        rpqfx.load(tmp_path / "foreign.rpq", forbidden)


def test_foreign_safetensors_files_are_refused_as_foreign(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FormatError, match=r"is a safetensors file, but not one that rpqfx\.save wrote"):
        rpqfx.load(tmp_path / "foreign.safetensors", forbidden)
    (tmp_path / "foreign.safetensors").write_bytes(b"GIF89a nothing of ours")
    with pytest.raises(FormatError, match="truncated, altered or no safetensors file"):
        rpqfx.load(tmp_path / "foreign.safetensors", forbidden)


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("exit 1",))


def test_code_in_a_file_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save({"rpqfx": Evil(), "seal": "", "tensors": {}}, tmp_path / "evil.rpq")
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("code ran"))
    with pytest.raises(FormatError, match="a torch file, but not one that"):
        rpqfx.load(tmp_path / "evil.rpq", forbidden)


@both_formats
def test_a_missing_file_is_a_missing_file(suffix: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        rpqfx.load(tmp_path / f"none{suffix}", forbidden)


# -------------------------------------------------------------------------------------------------- wrong builds


def changed(model: nn.Module, **children: Any) -> nn.Module:
    for name, child in children.items():
        setattr(model, name, child)
    return model


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.other = nn.Linear(12, 32), nn.Linear(32, 8)


WRONG = {
    "another width": (lambda: MLP(width=48), r"holds fc1\.weight of shape \(32, 12\), build\(\) made it \(48, 12\)"),
    "a bias missing": (
        lambda: changed(MLP(), fc2=nn.Linear(32, 8, bias=False)),
        r"holds fc2\.bias, which the model that build\(\) made has not",
    ),
    "another bias": (
        lambda: changed(MLP(), fc2=changed(nn.Linear(32, 8), bias=nn.Parameter(torch.zeros(9)))),
        r"holds fc2\.bias of shape \(8,\), build\(\) made it \(9,\)",
    ),
    "a layer missing": (Renamed, r"holds fc2\.weight, which the model that build\(\) made has not"),
    "a layer more": (
        lambda: changed(MLP(), extra=nn.Linear(3, 3)),
        r"build\(\) made extra\.\w+, which .* does not hold: it is of another model",
    ),
    "a buffer more": (lambda: changed(MLP(), norm=nn.BatchNorm1d(8)), r"build\(\) made norm\.\w+, which"),
    "no module": (lambda: {"fc1": 1}, r"build\(\) must return a torch\.nn\.Module, got dict"),
    "already rewritten": (
        lambda: nn.Sequential(RPQLinear(64, 64)),
        r"build\(\) must return the dense model, as it was before rpqify; it is already rewritten",
    ),
}


@both_formats
@pytest.mark.parametrize("name", WRONG)
def test_a_build_of_another_model_is_refused_by_what_differs(name: str, suffix: str, tmp_path: Path):
    build, why = WRONG[name]
    rpqfx.save(small_mlp(), tmp_path / f"m{suffix}")
    with pytest.raises(FormatError, match=why):
        rpqfx.load(tmp_path / f"m{suffix}", build)


def test_a_build_whose_buffer_has_another_shape_is_refused(tmp_path: Path):
    def build(channels: int = 8) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), changed(nn.Module(), table=nn.Buffer(torch.zeros(channels))))

    rpqfx.save(rpqfx.rpqify(build(), SMALL), tmp_path / "m.rpq")
    with pytest.raises(FormatError, match=r"holds 1\.table of shape \(8,\), build\(\) made it \(9,\)"):
        rpqfx.load(tmp_path / "m.rpq", lambda: build(9))


class Grows(Keeper):
    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.arange(float(len(x)))
        return super().forward(x)


def test_a_hidden_buffer_may_have_grown_since(tmp_path: Path):
    small = rpqfx.rpqify(Grows(), SMALL)
    small(torch.randn(9, 16))
    rpqfx.save(small, tmp_path / "m.rpq")
    assert torch.equal(rpqfx.load(tmp_path / "m.rpq", Grows).hidden, torch.arange(9.0))


def test_what_build_raises_is_its_own(tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    with pytest.raises(ZeroDivisionError):
        rpqfx.load(tmp_path / "m.rpq", lambda: 1 // 0)
    with pytest.raises(RuntimeError, match=r"^shapes .* cannot|size"):
        rpqfx.load(tmp_path / "m.rpq", lambda: torch.ones(2, 3, device="cpu").view(5))


# --------------------------------------------------------------------------------------------- saving, whole or not


@both_formats
@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_fails_leaves_nothing_new_and_the_old_file_whole(
    existing: bool, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / f"m{suffix}"
    before = saved(tmp_path, suffix)
    (tmp_path / f"whole{suffix}").unlink()
    if existing:
        path.write_bytes(before)

    def fails(data: Any, file: Any, *metadata: Any) -> None:
        if isinstance(file, Path):
            file.write_bytes(b"half")
        else:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    if suffix == ".safetensors":
        monkeypatch.setattr("safetensors.torch.save_file", fails)
    else:
        monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        rpqfx.save(small_mlp(), path)
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if existing else [])
    assert not existing or path.read_bytes() == before


FULL = """
import resource, signal, sys, torch, rpqfx
from torch import nn
models = [rpqfx.rpqify(nn.Sequential(nn.Linear(n, n)), rpqfx.Policy.from_scratch()) for n in (64, 256, 2048)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
before, said = resource.getrlimit(resource.RLIMIT_FSIZE), []
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
for model in models:
    try:
        rpqfx.save(model, sys.argv[1])
    except OSError as error:
        said.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, before)
print(*said, sep="\\n")
"""


@both_formats
@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit there")
def test_a_file_that_the_system_does_not_let_grow_says_so(suffix: str, tmp_path: Path):
    """As on a full disk: what torch and safetensors raise then are errors of their own, and torch's names no cause."""
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"old")
    done = forks.run(FULL, str(path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("File too large" in line and path.name in line for line in lines), done.stdout
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"old"


def test_an_existing_file_is_replaced_and_nothing_else_is_left(tmp_path: Path):
    path = tmp_path / "m.rpq"
    path.write_bytes(b"old")
    small = small_mlp()
    rpqfx.save(small, str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["m.rpq"]
    assert_identical(rpqfx.load(str(path), MLP), small)


def test_a_saved_file_has_the_permissions_of_any_file(tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    (tmp_path / "any").write_bytes(b"")
    assert (tmp_path / "m.rpq").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_saving_a_model_does_not_change_it(tmp_path: Path):
    small = small_mlp()
    before = {name: t.clone() for name, t in small.state_dict().items()}
    rpqfx.save(small, tmp_path / "m.rpq")
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())


def test_what_cannot_be_saved_says_so(tmp_path: Path):
    with pytest.raises(RPQError, match=r"no weight of this model is quantized; save a dense model with"):
        rpqfx.save(MLP(), tmp_path / "m.rpq")
    with torch.device("meta"):
        model = MLP()
    with pytest.raises(RPQError, match=r"is on the meta device and has no values; call rpqfx\.materialize first"):
        rpqfx.save(rpqfx.rpqify(model, SMALL), tmp_path / "m.rpq")
    small = small_mlp()
    small.fc1.weight_rpq.codes[0, 0, 0] = 200
    with pytest.raises(
        CodeError, match=r"^fc1\.weight_rpq\.codes holds codes of 0 to 200, but the codebook has 4 entries"
    ):
        rpqfx.save(small, tmp_path / "m.rpq")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- without optional packages


def test_without_safetensors_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for attempt in (
        lambda: rpqfx.save(small_mlp(), tmp_path / "new.safetensors"),
        lambda: rpqfx.load(tmp_path / "m.safetensors", MLP),
    ):
        with pytest.raises(ImportError, match=r"pip install 'rpqfx\[safetensors\]'"):
            attempt()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    rpqfx.load(tmp_path / "m.rpq", MLP)


def test_no_numpy_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_numpy(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Numpy is not available")

    small = rpqfx.rpqify(GPT().bfloat16(), SMALL)
    plain = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "numpy":
            raise ModuleNotFoundError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(Tensor, "numpy", no_numpy)
    monkeypatch.setattr(Tensor, "__array__", no_numpy)
    monkeypatch.setattr(torch, "from_numpy", no_numpy)
    monkeypatch.setattr(builtins, "__import__", importing)
    rpqfx.save(small, tmp_path / "m.rpq")
    assert_identical(rpqfx.load(tmp_path / "m.rpq", GPT), small)


def test_a_file_may_be_read_from_any_place(tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    data = io.BytesIO((tmp_path / "m.rpq").read_bytes())
    assert set(torch.load(data, weights_only=True)) == {"rpqfx", "seal", "tensors"}


# ------------------------------------------------------------------------------------------- where files come and go


@both_formats
def test_file_objects_are_written_and_read(suffix: str, tmp_path: Path):
    small = small_mlp()
    with open(tmp_path / f"m{suffix}", "wb") as file:
        rpqfx.save(small, file)
    assert contents(tmp_path / f"m{suffix}")[0]
    with open(tmp_path / f"m{suffix}", "rb") as file:
        assert_identical(rpqfx.load(file, MLP), small)
    memory = io.BytesIO(b"before")
    memory.seek(6)
    rpqfx.save(small, memory)
    memory.seek(6)
    assert_identical(rpqfx.load(memory, MLP), small)
    rpqfx.save(small, os.fsencode(tmp_path / f"bytes{suffix}"))
    assert_identical(rpqfx.load(os.fsencode(tmp_path / f"bytes{suffix}"), MLP), small)


def test_a_file_object_gets_all_or_nothing(monkeypatch: pytest.MonkeyPatch):
    memory = io.BytesIO()

    def fails(value: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        rpqfx.save(small_mlp(), memory)
    assert not memory.getvalue()


def test_what_no_model_can_be_written_to_or_read_from_says_so(tmp_path: Path):
    with pytest.raises(InputError, match=r"path or a file object open for writing in binary, got a StringIO in text"):
        rpqfx.save(small_mlp(), io.StringIO())
    with pytest.raises(InputError, match="open for writing in binary, got int"):
        rpqfx.save(small_mlp(), 3)
    with pytest.raises(InputError, match=r"open for reading in binary, got a StringIO in text mode; open it with 'rb'"):
        rpqfx.load(io.StringIO(), forbidden)
    with pytest.raises(InputError, match="open for reading in binary, got NoneType"):
        rpqfx.load(None, forbidden)
    with pytest.raises(InputError, match=r"save takes a torch\.nn\.Module, got dict"):
        rpqfx.save({}, tmp_path / "m.rpq")
    for ask in (lambda: rpqfx.save(small_mlp(), tmp_path), lambda: rpqfx.load(tmp_path, forbidden)):
        with pytest.raises(IsADirectoryError, match="is a folder; give the name of"):
            ask()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        rpqfx.save(small_mlp(), tmp_path / "none" / "m.rpq")


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "real.rpq").write_bytes(b"old")
    (tmp_path / "link.rpq").symlink_to("real.rpq")
    small = small_mlp()
    rpqfx.save(small, tmp_path / "link.rpq")
    assert (tmp_path / "link.rpq").is_symlink() and not (tmp_path / "real.rpq").is_symlink()
    assert_identical(rpqfx.load(tmp_path / "real.rpq", MLP), small)


@pytest.mark.parametrize("name", ["a b.rpq", "é日本", ".rpq", "UP.SAFETENSORS", "a.b.safetensors", "$HOME'\"\n.rpq"])
def test_files_may_be_called_anything(name: str, tmp_path: Path):
    pytest.importorskip("safetensors")
    small = small_mlp()
    rpqfx.save(small, tmp_path / name)
    assert ((tmp_path / name).read_bytes()[:2] == b"PK") != name.lower().endswith(".safetensors")
    assert_identical(rpqfx.load(tmp_path / name, MLP), small)
    (tmp_path / name).rename(tmp_path / "renamed.rpq")
    assert_identical(rpqfx.load(tmp_path / "renamed.rpq", MLP), small)


@pytest.mark.parametrize("option", ["device", "build_device"])
def test_a_device_that_is_not_there_is_refused_before_any_work(option: str, tmp_path: Path):
    rpqfx.save(small_mlp(), tmp_path / "m.rpq")
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(RPQError, match=f"the device '{device}' is not to be had here"):
            rpqfx.load(tmp_path / "m.rpq", forbidden, **{option: device})


def test_loading_has_its_own_device(tmp_path: Path):
    small = small_mlp()
    rpqfx.save(small, tmp_path / "m.rpq")
    with torch.device("meta"):
        again = rpqfx.load(tmp_path / "m.rpq", MLP)
    assert_identical(again, small)
    assert {p.device.type for p in rpqfx.load(tmp_path / "m.rpq", MLP, device="meta").parameters()} == {"meta"}


# ------------------------------------------------------------------------------------------------ what comes back


@both_formats
@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "another model"])
def test_what_does_not_come_back_as_it_was_written_replaces_nothing(
    damage: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small, other, path = small_mlp(), rpqfx.rpqify(MLP(), SMALL), tmp_path / f"m{suffix}"
    rpqfx.save(other, tmp_path / f"other{suffix}")
    path.write_bytes(b"old")
    write = serialize.writer_for(path.name)

    def failing(part: Path, text: str, seal: str, tensors: dict[str, Tensor]) -> None:
        write(part, text, seal, tensors)
        content = bytearray(part.read_bytes())
        if damage == "a flipped bit":
            content[bytes(content).index(bytes(tensors["fc1.bias"].view(torch.uint8).tolist()))] ^= 1
        elif damage == "cut":
            del content[len(content) // 2 :]
        else:
            content = bytearray((tmp_path / f"other{suffix}").read_bytes())
        part.write_bytes(content)

    monkeypatch.setattr(serialize, "writer_for", lambda name: failing)
    with pytest.raises(OSError, match=r"what was written to .* does not come back \(.*\), so the file is as it was"):
        rpqfx.save(small, path)
    assert path.read_bytes() == b"old" and not list(tmp_path.glob("*.part"))


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path):
    small, path = small_mlp(), tmp_path / "m.rpq"
    path.write_bytes(b"old")
    nn.utils.parametrize.register_parametrization(small.fc1.weight_rpq, "codebooks", nn.Identity())
    with pytest.raises(RPQError, match=r"could not be loaded again, so it is not saved: lacks fc1\.weight_rpq\.code"):
        rpqfx.save(small, path)
    small = rpqfx.rpqify(changed(MLP(), table=nn.Buffer(torch.eye(3).to_sparse())), SMALL)
    with pytest.raises(RPQError, match=r"table is a torch\.sparse_coo, and files hold plain dense tensors"):
        rpqfx.save(small, path)
    assert path.read_bytes() == b"old"


@both_formats
def test_parts_of_larger_memory_are_stored_as_parts(suffix: str, tmp_path: Path):
    small = rpqfx.rpqify(MLP(), SMALL)
    small.register_buffer("part", torch.arange(10.0**5)[5:9])
    small.register_buffer("apart", torch.arange(12.0)[::3])
    rpqfx.save(small, tmp_path / f"m{suffix}")
    assert (tmp_path / f"m{suffix}").stat().st_size < 10**5
    build = lambda: changed(MLP(), part=nn.Buffer(torch.zeros(4)), apart=nn.Buffer(torch.zeros(4)))  # noqa: E731
    assert_identical(rpqfx.load(tmp_path / f"m{suffix}", build), small)


def test_tensors_that_share_memory_still_do(tmp_path: Path):
    def build() -> nn.Module:
        model = changed(MLP(), both=nn.Buffer(torch.arange(6.0)))
        return changed(model, first=nn.Buffer(model.both[:2]))

    small = rpqfx.rpqify(build(), SMALL)
    rpqfx.save(small, tmp_path / "m.rpq")
    again = rpqfx.load(tmp_path / "m.rpq", build)
    again.both[0] = 7
    assert again.first[0] == 7
    pytest.importorskip("safetensors")
    with pytest.raises(RPQError, match=r"share memory without being one tensor.*save under another name"):
        rpqfx.save(small, tmp_path / "m.safetensors")


def test_codes_out_of_range_do_not_come_out_of_an_unpacked_file(tmp_path: Path):
    small, name = small_mlp(), "fc1.weight_rpq.codes"
    rpqfx.save(small, tmp_path / "m.rpq")
    held = torch.load(tmp_path / "m.rpq", weights_only=True)
    manifest = json.loads(held["rpqfx"])
    next(entry for entry in manifest["tensors"] if entry["names"][0] == name).pop("packed")
    held["tensors"][name] = small.get_buffer(name).clone()
    held["tensors"][name][0, 0, 0] = 200
    text = json.dumps({**manifest, "checksum": checksum(held["tensors"])})
    torch.save({**held, "rpqfx": text, "seal": seal_of(text)}, tmp_path / "m.rpq")
    with pytest.raises(FormatError, match=r"fc1\.weight_rpq\.codes, which cannot be unpacked: codes of 0 to 200"):
        rpqfx.load(tmp_path / "m.rpq", forbidden)
