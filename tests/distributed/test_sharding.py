"""Under fully_shard each process holds its part of codebooks and codes, and training is training in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import rpqfx.distributed
from rpqfx import errors
from rpqfx.distributed import fully_shard, load_full_state_dict
from rpqfx.distributed.sharding import axis_to_cut
from rpqfx.errors import CodeError, DistributedError, InputError, RewriteError
from rpqfx.nn import RPQWeight
from tests import processes
from tests.distributed.training import NEEDS_INTEGERS, batches, expected, loss_of, losses, mine, net

RANKS = 2
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """A model whose blocks are groups, as its remaining layers are together."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def bytes_held(model: nn.Module) -> int:
    """Bytes of codes, signs, codebooks and factors that this process holds."""
    held = {id(t): t for w in model.modules() if isinstance(w, RPQWeight) for t in (*w.parameters(), *w.buffers())}
    return sum((t.to_local() if isinstance(t, DTensor) else t).untyped_storage().nbytes() for t in held.values())


def same_losses(steps: int = 20, after: bool | None = None, **options: Any) -> None:
    model = net(**options)
    before, wanted = bytes_held(model), expected(model, steps=steps)
    model = sharded(model, reshard_after_forward=after)
    assert bytes_held(model) <= 1.1 / dist.get_world_size() * before
    torch.testing.assert_close(losses(model, steps, split=True), wanted, **TOLERANCE)
    if after is not False:
        for group in (*model.blocks, model):
            group.reshard()
        assert bytes_held(model) <= 1.1 / dist.get_world_size() * before


def training_in_shards_is_training_in_one_process() -> None:
    same_losses(codebook_bits=9, stages=2, scale=True, signs=True)


def tensors_that_stay_whole_between_passes_train_as_in_one_process() -> None:
    same_losses(steps=4, after=False, tied=False)


def every_kind_of_codebooks_is_trained_in_shards_as_in_one_process() -> None:
    for options in (
        {"codebook_bits": 8}, {"codebook_bits": 9, "tied": False, "scale": True},
        {"column_scale": True, "sharing": "layer"}, {"after": True},
        {"grad_scale": "sqrt", "stages": 3, "after": False},
    ):  # fmt: skip
        same_losses(**options)


def shared_codebooks_in_one_group_train_as_in_one_process() -> None:
    for sharing in ("role", "shape"):
        model = net(sharing=sharing)
        wanted = expected(model, steps=5)
        model = fully_shard(model)
        torch.testing.assert_close(losses(model, 5, split=True), wanted, **TOLERANCE)
        books = [w.codebooks for w in model.modules() if isinstance(w, RPQWeight) and w.shares_codebooks]
        assert len({id(book) for book in books}) < len(books)
    model = net(sharing="role")
    wanted = expected(model, steps=3)
    fully_shard([model.blocks[0], model.blocks[1]])
    torch.testing.assert_close(losses(fully_shard(model), 3, split=True), wanted, **TOLERANCE)


def groups_that_would_part_what_is_shared_are_refused_by_name() -> None:
    model = net(sharing="role")
    before = list(model.state_dict())
    with pytest.raises(
        DistributedError, match=r"blocks\.0\.1\.weight .*inside.*blocks\.1\.1\.weight .*outside.*one call"
    ):
        fully_shard(model.blocks[0])
    assert all("codes" in w._buffers for w in model.modules() if isinstance(w, RPQWeight))
    assert list(model.state_dict()) == before
    model = net(tied=True)
    fully_shard(model.embed)
    with pytest.raises(DistributedError, match=r"(embed|head)\.weight .*is tied to a module.*\[first, second\]"):
        fully_shard(model)


def a_call_that_fails_leaves_codes_as_they_were() -> None:
    model = net()
    with pytest.raises(ZeroDivisionError):
        fully_shard(model, shard_placement_fn=lambda parameter: 1 // 0)
    assert all("codes" in w._buffers for w in model.modules() if isinstance(w, RPQWeight))
    assert torch.isfinite(loss_of(model, next(batches(1))))


def codes_are_never_cast() -> None:
    model = net(9, dtype=torch.float32)
    wanted = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen: list[Tensor] = []
    model = sharded(model, mp_policy=policy)
    model.norm.register_forward_pre_hook(lambda m, args: seen.append(model.head.weight_rpq.codes.clone()))
    ids = next(batches(1))
    found = loss_of(model, mine(ids))
    found.backward()
    dist.all_reduce(found := found.detach().float())
    torch.testing.assert_close(found / dist.get_world_size(), loss_of(wanted, ids).detach(), rtol=0.02, atol=0)
    assert seen[0].dtype == torch.int16 and torch.equal(seen[0], wanted.head.weight_rpq.codes)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def checkpointed_blocks_train_as_in_one_process() -> None:
    model = net(8)
    wanted = expected(model, steps=3)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    torch.testing.assert_close(losses(sharded(model), 3, split=True), wanted, **TOLERANCE)


def gradients_are_gathered_over_several_backward_passes() -> None:
    model = net(8)
    wanted = expected(model, steps=3)
    torch.testing.assert_close(losses(sharded(model), 3, split=True, parts=2), wanted, **TOLERANCE)


def a_model_sharded_on_the_meta_device_gets_the_values_of_one_process() -> None:
    for options in (
        {"codebook_bits": 9, "signs": True, "stages": 2},
        {"sharing": "role", "tied": False, "scale": True},
    ):
        whole = net(device="meta", **options)
        torch.manual_seed(3)
        rpqfx.materialize(whole)
        shards = net(device="meta", **options)
        shards = fully_shard(shards) if "sharing" in options else sharded(shards)
        torch.manual_seed(dist.get_rank())
        with pytest.raises(DistributedError, match=r"torch\.manual_seed"):
            rpqfx.distributed.materialize(shards)
        torch.manual_seed(3)
        assert rpqfx.distributed.materialize(shards) is shards
        same_values(shards, whole)
        wanted = expected(whole, steps=2)
        torch.testing.assert_close(losses(shards, 2, split=True), wanted, **TOLERANCE)
    with pytest.raises(DistributedError, match=r"rpqfx\.materialize"):
        rpqfx.distributed.materialize(shards)


def same_values(shards: nn.Module, whole: nn.Module) -> None:
    """Gathers what is shared out, and puts it into another model, which then is the same as the whole one."""
    state = get_model_state_dict(shards, options=StateDictOptions(full_state_dict=True))
    other = copy.deepcopy(whole)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(state)
    wanted = whole.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name, tensor in other.state_dict().items() if not torch.equal(tensor, wanted[name])] == []


def full_state_dicts_come_and_go() -> None:
    for bits in (8, 9):
        whole, model = net(bits), sharded(net(bits))
        same_values(model, whole)
        other = sharded(net(bits, seed=1))
        if bits == 8:  # torch sends what it shares out, and int16 is what nobody sends
            set_model_state_dict(other, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
        else:
            assert not any(load_full_state_dict(other, whole.state_dict()))
        same_values(other, whole)
        ids = next(batches(1))
        assert torch.equal(other(ids), whole(ids))
    state = whole.state_dict()
    with pytest.raises(CodeError, match=r"head\.weight_rpq\.codes holds"):
        load_full_state_dict(other, {**state, "head.weight_rpq.codes": state["head.weight_rpq.codes"] + 512})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_full_state_dict(other, {**state, "norm.weight": torch.ones(3)})


def what_needs_whole_tensors_refuses_shards() -> None:
    model = sharded(net())
    for call in (lambda: rpqfx.save(model, "nowhere"), lambda: rpqfx.materialize(model)):
        with pytest.raises(RewriteError, match="needs whole tensors"):
            call()
    with pytest.raises(DistributedError, match="shared out"):
        rpqfx.distributed.check_same_codes(model)
    with pytest.raises(AssertionError, match="already been applied"):
        fully_shard(model)
    assert str(rpqfx.report(model)) == str(rpqfx.report(net()))  # of all processes' parts together


CLAIMS = [
    training_in_shards_is_training_in_one_process,
    tensors_that_stay_whole_between_passes_train_as_in_one_process,
    shared_codebooks_in_one_group_train_as_in_one_process,
    groups_that_would_part_what_is_shared_are_refused_by_name,
    a_call_that_fails_leaves_codes_as_they_were,
    codes_are_never_cast,
    checkpointed_blocks_train_as_in_one_process,
    gradients_are_gathered_over_several_backward_passes,
    a_model_sharded_on_the_meta_device_gets_the_values_of_one_process,
    full_state_dicts_come_and_go,
    what_needs_whole_tensors_refuses_shards,
]
LONG = [every_kind_of_codebooks_is_trained_in_shards_as_in_one_process]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.run(CLAIMS, RANKS, tmp_path_factory.mktemp("fsdp"))


@NEEDS_INTEGERS
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_in_two_processes(claim: Callable[[], None], said: Path) -> None:
    found = processes.failure(said, claim, RANKS)
    assert not found, found


@NEEDS_INTEGERS
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_at_length(ranks: int, tmp_path: Path) -> None:
    claims = [*LONG, *CLAIMS]
    processes.run(claims, ranks, tmp_path)
    found = "".join(processes.failure(tmp_path, claim, ranks) for claim in claims)
    assert not found, found


def test_versions_of_torch_that_shard_no_integers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(DistributedError, match=r"of torch 2\.12\.1\+cpu cannot shard; use torch 2\.13"):
        fully_shard(net())


def test_the_axis_that_is_cut_is_one_that_the_processes_divide() -> None:
    for shape, ranks, axis in (
        ((1, 4, 16, 4), 2, 1),
        ((1, 3, 16, 4), 2, 2),
        ((8, 3), 4, 0),
        ((1, 5, 7), 2, 0),
        ((6,), 4, 0),
    ):
        assert axis_to_cut(torch.empty(shape), ranks) == axis


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"takes a torch\.nn\.Module"):
        fully_shard([{}])  # type: ignore[list-item]
    assert issubclass(errors.DistributedError, errors.RPQError)
