"""Layers split by parallelize_module compute and train as whole ones, whatever their codebooks are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import parallel as dense
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import rpqfx.distributed
from rpqfx.distributed import ColwiseParallel, RowwiseParallel, fully_shard, load_full_state_dict
from rpqfx.distributed.sharding import shards_integers
from rpqfx.distributed.split_weight import SplitWeight
from rpqfx.errors import DistributedError, RewriteError
from rpqfx.nn import RPQConv2d, RPQEmbedding, RPQLinear, RPQWeight
from tests import processes
from tests.distributed.training import batches, expected, loss_of, losses, net

RANKS = 2
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


def line() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def split(model: nn.Module, mesh: Any, **styles: Any) -> nn.Module:
    """A model whose blocks have split insides, with a table and a head that are split along the vocabulary."""
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate()), "blocks.*.1": ColwiseParallel(),
        "blocks.*.3": RowwiseParallel(), "head": ColwiseParallel(output_layouts=Replicate()), **styles,
    }  # fmt: skip
    return parallelize_module(model, mesh, plan)


def in_sequence(model: nn.Module, mesh: Any) -> nn.Module:
    """The same with activations that are split along the sequence between blocks."""
    return parallelize_module(model, mesh, {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), "blocks.*.0": SequenceParallel(),
        "blocks.*.1": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.3": RowwiseParallel(output_layouts=Shard(1)), "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    })  # fmt: skip


def same_losses(steps: int = 20, **options: Any) -> None:
    model = net(**options)
    wanted = expected(model, steps=steps)
    torch.testing.assert_close(losses(split(model, line()), steps, split=False), wanted, **TOLERANCE)


def training_of_split_layers_is_training_in_one_process() -> None:
    same_losses(codebook_bits=9, stages=2, scale=True, signs=True, column_scale=True)


def every_kind_of_codebooks_is_trained_split_as_in_one_process() -> None:
    for options in (
        {"sharing": "layer", "grad_scale": "mean", "tied": False}, {"split": "column", "grad_scale": "sqrt"},
        {"split": "column", "column_scale": True, "scale": True, "tied": False}, {"split": "row", "grad_scale": "sqrt"},
    ):  # fmt: skip
        same_losses(4, **options)


def each_process_holds_its_part() -> None:
    model, ranks = net(9, scale=True, split="row"), dist.get_world_size()
    whole = {name: w.stored_codes.nbytes for name, w in model.named_modules() if isinstance(w, RPQWeight)}
    split(model, line())
    for name, weight in model.named_modules():
        if isinstance(weight, RPQWeight):
            codes: Any = weight.stored_codes
            assert (
                isinstance(weight, SplitWeight) and codes.to_local().untyped_storage().nbytes() == whole[name] // ranks
            )
    books: Any = model.blocks[0][3].weight_rpq.codebooks
    assert books.to_local().shape[1] == books.shape[1] // ranks


def layers_compute_and_have_gradients_as_whole_ones() -> None:
    torch.manual_seed(0)
    for style in (ColwiseParallel, RowwiseParallel):
        for options in ({"stages": 2, "signs": True, "column_scale": True}, {"sharing": "layer", "scale": True}):
            for how in ("row", "column"):
                layer = RPQLinear(32, 48, codebook_dim=4, codebook_bits=3, split=how, dtype=torch.float64, **options)
                x = torch.randn(5, 32, dtype=torch.float64)
                as_whole(layer, style(input_layouts=Replicate(), output_layouts=Replicate()), x)
        for options in ({"padding_idx": 3}, {"scale_grad_by_freq": True, "signs": True}):
            layer = RPQEmbedding(64, 32, codebook_dim=4, codebook_bits=3, dtype=torch.float64, **options)
            as_whole(layer, style(input_layouts=Replicate(), output_layouts=Replicate()), torch.randint(64, (4, 7)))


def codes_in_tiles_are_split_and_sharded() -> None:
    torch.manual_seed(0)
    for style in (ColwiseParallel, RowwiseParallel):
        layer, x = (
            RPQLinear(64, 128, codebook_dim=4, codebook_bits=4, stages=2, dtype=torch.float64),
            torch.randn(5, 64).double(),
        )
        spec = rpqfx.CodebookSpec(128, 64, 4, entries=16, stages=2, scale=True, tiled=True)
        layer._modules["weight_rpq"] = RPQWeight(spec, dtype=torch.float64)
        if shards_integers():
            torch.testing.assert_close(fully_shard(copy.deepcopy(layer))(x), layer(x))
        as_whole(layer, style(input_layouts=Replicate(), output_layouts=Replicate()), x)


def as_whole(layer: nn.Module, style: Any, x: Tensor) -> None:
    whole = copy.deepcopy(layer)
    parallelize_module(layer, line(), style)
    for one in (layer, whole):
        y = one(x)
        (y.sin().sum() + y.square().sum()).backward()
    torch.testing.assert_close(layer(x), whole(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole(x))
    wanted = dict(whole.named_parameters())
    for name, parameter in layer.named_parameters():
        grad: Any = parameter.grad
        torch.testing.assert_close(grad.full_tensor(), wanted[name].grad, msg=name)


def activations_split_along_the_sequence_train_as_whole_ones() -> None:
    model = net(8)
    wanted = expected(model, steps=1)
    model = in_sequence(model, line())
    torch.testing.assert_close(losses(model, 1, split=False), wanted, **TOLERANCE)
    model, whole = in_sequence(net(8, tied=False), line()), net(8, tied=False)
    for one in (model, whole):
        loss_of(one, next(batches(1))).backward()
    named = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        torch.testing.assert_close(grad.full_tensor(), named[name].grad, msg=name)


def ids_that_are_no_rows_are_refused_in_every_process() -> None:
    layer = RPQEmbedding(64, 32, codebook_dim=4, codebook_bits=3)
    parallelize_module(layer, line(), RowwiseParallel(input_layouts=Replicate()))
    with pytest.raises((IndexError, RuntimeError)):
        layer(torch.tensor([3, 64]))


def split_and_sharded_trains_as_in_one_process() -> None:
    ranks = dist.get_world_size()
    for shape in ((1, ranks), (ranks, 1)) if ranks == 2 else ((2, 2),):
        in_two_axes(*shape)


def in_two_axes(rows: int, columns: int) -> None:
    mesh = init_device_mesh("cpu", (rows, columns), mesh_dim_names=("dp", "tp"))
    model = net(9, stages=2, scale=True, tied=False)
    before = held(model)
    wanted = expected(model, steps=3)
    split(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    assert held(model) <= 1.1 / rows * before
    found = losses(model, 3, split=True, rows=lambda x: x.chunk(rows)[mesh["dp"].get_local_rank()])
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def held(model: nn.Module) -> int:
    tensors: list[Any] = [
        t for w in model.modules() if isinstance(w, RPQWeight) for t in (*w.parameters(), *w.buffers())
    ]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def all_take_the_values_of_rank_0() -> None:
    model, whole = net(8, seed=dist.get_rank(), tied=False), net(8, tied=False)
    split(model, line())
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    own = {name for name, p in model.named_parameters() if isinstance(p, DTensor)} | {"head.weight_rpq.codes"}
    wanted = whole.state_dict()
    assert own and all(torch.equal(gathered[name], wanted[name]) for name in own)


def state_dicts_come_and_go() -> None:
    for bits in (8, 9):
        whole, model = net(bits), split(net(bits, seed=1), line())
        load_full_state_dict(model, whole.state_dict())
        ids = next(batches(1))[:, :-1]
        torch.testing.assert_close(model(ids), whole(ids))
        other = net(bits, seed=2)
        other.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        assert torch.equal(other(ids), whole(ids))


def what_cannot_be_split_is_refused_by_name_and_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "up": RPQLinear(32, 48, codebook_dim=32, codebook_bits=3),
            "odd": RPQLinear(32, 47, codebook_dim=4, codebook_bits=3),
        }
    )
    conv = RPQConv2d(4, 8, 3, codebook_dim=9, codebook_bits=2)
    signed = RPQLinear(32, 8, codebook_dim=4, codebook_bits=2, signs=True)
    normed = RPQEmbedding(64, 32, codebook_dim=4, codebook_bits=3, max_norm=1.0)
    for module, style, said in (
        (model["up"], RowwiseParallel(), r"up\.weight .*16 for each.*codebook_dim that divides 16"),
        (model["odd"], ColwiseParallel(), r"odd\.weight .*47 of them, which 2 does not divide"),
        (conv, ColwiseParallel(), "splits RPQLinear and RPQEmbedding, got RPQConv2d"),
        (signed, ColwiseParallel(), "signs of 8 vectors are a byte"),
        (normed, ColwiseParallel(), "max_norm"),
        (net(sharing="role").blocks[0][1], ColwiseParallel(), r"same codebooks.*sharing='own'"),
    ):  # fmt: skip
        before = list(module.state_dict())
        with pytest.raises(DistributedError, match=said):
            parallelize_module(module, line(), style)
        assert list(module.state_dict()) == before and not any(isinstance(m, SplitWeight) for m in module.modules())
        assert not any(isinstance(t, DTensor) for t in module.state_dict().values())


def torchs_own_styles_are_refused_and_ours_take_dense_layers() -> None:
    layer = RPQLinear(32, 48, codebook_dim=4, codebook_bits=3)
    with pytest.raises(DistributedError, match=r"rpqfx\.distributed \(ColwiseParallel, RowwiseParallel\)"):
        parallelize_module(layer, line(), dense.ColwiseParallel())
    with pytest.raises(RuntimeError, match="leaf"):  # torch's own, which reads the weight first
        parallelize_module(layer, line(), dense.RowwiseParallel())
    assert not any(isinstance(parameter, DTensor) for parameter in layer.parameters())
    torch.manual_seed(0)
    plain, x = nn.Linear(8, 4), torch.randn(3, 8)
    wanted = plain(x)
    parallelize_module(plain, line(), RowwiseParallel(input_layouts=Replicate()))
    torch.testing.assert_close(plain(x), wanted)


def what_needs_whole_tensors_refuses_parts() -> None:
    model = split(net(), line())
    plain = parallelize_module(nn.Sequential(nn.Linear(64, 64)), line(), {"0": ColwiseParallel()})
    for call in (
        lambda: rpqfx.save(model, "nowhere"), lambda: rpqfx.tune(model, next(batches(1))),
        lambda: rpqfx.rpqify(plain, rpqfx.Policy(codebook_dim=4, codebook_bits=4, min_size=64)),
    ):  # fmt: skip
        with pytest.raises(RewriteError, match=r"needs whole tensors, and processes have parts of those of"):
            call()
    with pytest.raises(DistributedError, match="shared out"):
        rpqfx.distributed.check_same_codes(model)


CLAIMS = [
    training_of_split_layers_is_training_in_one_process,
    each_process_holds_its_part,
    layers_compute_and_have_gradients_as_whole_ones,
    codes_in_tiles_are_split_and_sharded,
    activations_split_along_the_sequence_train_as_whole_ones,
    ids_that_are_no_rows_are_refused_in_every_process,
    all_take_the_values_of_rank_0,
    state_dicts_come_and_go,
    what_cannot_be_split_is_refused_by_name_and_left_alone,
    torchs_own_styles_are_refused_and_ours_take_dense_layers,
    what_needs_whole_tensors_refuses_parts,
]
SHARDED = [split_and_sharded_trains_as_in_one_process] if shards_integers() else []
LONG = [every_kind_of_codebooks_is_trained_split_as_in_one_process]
FOUR = [CLAIMS[0], each_process_holds_its_part, state_dicts_come_and_go, *SHARDED]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.run([*CLAIMS, *SHARDED], RANKS, tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize("claim", [*CLAIMS, *SHARDED], ids=lambda claim: claim.__name__)
def test_in_two_processes(claim: Callable[[], None], said: Path) -> None:
    found = processes.failure(said, claim, RANKS)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize(("claims", "ranks"), [(LONG, 2), (FOUR, 4)])
def test_at_length(claims: list[Callable[[], None]], ranks: int, tmp_path: Path) -> None:
    processes.run(claims, ranks, tmp_path)
    found = "".join(processes.failure(tmp_path, claim, ranks) for claim in claims)
    assert not found, found
