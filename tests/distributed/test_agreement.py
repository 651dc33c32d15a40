"""Under DistributedDataParallel codes are sent once or not at all, and that all processes hold the same is seen to."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rpqfx
from rpqfx.distributed import broadcast_codes, check_same_codes
from rpqfx.errors import DistributedError, InputError
from rpqfx.nn import RPQWeight
from tests import processes
from tests.distributed.training import (
    Net,
    batches,
    codes_of,
    expected,
    loss_of,
    losses,
    mine,
    net,
    shift_codes,
    vocabulary,
)  # fmt: skip

RANKS = 2
BITS = (4, 8, 9, 16)
TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


class Sent:
    """Counts the bytes that DistributedDataParallel sends by broadcasts, and those of gradients."""

    def __init__(self, parallel: DistributedDataParallel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers = self.gradients = 0
        send = dist._broadcast_coalesced

        def broadcast(group: Any, tensors: list[Tensor], *rest: Any) -> Any:
            self.buffers += sum(tensor.nbytes for tensor in tensors)
            return send(group, tensors, *rest)

        monkeypatch.setattr(dist, "_broadcast_coalesced", broadcast)
        monkeypatch.setattr(parallel, "_distributed_broadcast_coalesced", lambda tensors, *rest: broadcast(
            parallel.process_group, tensors, *rest))  # fmt: skip
        parallel.register_comm_hook(None, self._hook)

    def _hook(self, state, bucket):  # torch reads annotations, if there are any, and expects no strings
        self.gradients += bucket.buffer().nbytes
        mean = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])


def codes_are_those_of_rank_0_after_a_broadcast() -> None:
    for bits in BITS:
        model = net(bits, seed=dist.get_rank(), signs=bits == 9)
        wanted = codes_of(net(bits, seed=0, signs=bits == 9))
        with pytest.raises(DistributedError, match=r"embed\.weight_rpq.*rank 1 differ.*broadcast_codes"):
            check_same_codes(model)
        assert model.embed.weight_rpq.spec.codebook_bits == bits
        assert broadcast_codes(model) is model
        check_same_codes(model)
        assert all(torch.equal(a, b) for a, b in zip(codes_of(model), wanted, strict=True))
        weights = [module for module in model.modules() if isinstance(module, RPQWeight)]
        assert all(weight.drawn_stages() for weight in weights)  # their seeds are those of rank 0, too


def a_weight_without_a_seed_gives_none() -> None:
    weight = RPQWeight(rpqfx.CodebookSpec(64, 16, 4, entries=16))
    if dist.get_rank() == 0:
        weight.code_seed = None
    broadcast_codes(nn.ModuleDict({"w": weight}))
    assert weight.code_seed is None


def signs_and_tiles_are_sent_and_compared_too() -> None:
    spec = rpqfx.CodebookSpec(64, 16, 4, entries=16, stages=2, tiled=True)
    for weight in (RPQWeight(spec), RPQWeight(rpqfx.CodebookSpec(64, 16, 4, entries=16, signs=True))):
        model = nn.ModuleDict({"w": weight})
        broadcast_codes(model)
        check_same_codes(model)
        changed = weight.stored_codes if weight.signs is None else weight.signs
        with torch.no_grad():
            changed.view(-1)[0] ^= 1 if dist.get_rank() else 0
        with pytest.raises(DistributedError, match=r"the codes of w are not the same"):
            check_same_codes(model)


def other_models_are_noticed_before_anything_is_sent() -> None:
    model = net(4 if dist.get_rank() else 5)
    before = codes_of(model)
    for call in (check_same_codes, broadcast_codes):
        with pytest.raises(DistributedError, match=r"rank 1 and of rank 0 hold other quantized weights"):
            call(model)
    assert all(torch.equal(a, b) for a, b in zip(codes_of(model), before, strict=True))


def ddp_sends_no_codes_whatever_broadcast_buffers_says() -> None:
    for bits in (8, 9):
        for buffers in (True, False):
            model = broadcast_codes(net(bits, seed=dist.get_rank()))
            model.register_buffer("noted", torch.zeros(3))  # one that has to be sent where buffers are
            parallel = DistributedDataParallel(model, broadcast_buffers=buffers)
            with pytest.MonkeyPatch.context() as patch:
                sent = Sent(parallel, patch)
                codebooks = sum(p.nbytes for p in model.parameters())
                dense = 8 * sum(p.numel() for p in net_of_dense(bits).parameters())
                loss_of(parallel, mine(next(batches(1)))).backward()
                assert sent.buffers == (12 if buffers else 0)
                assert codebooks <= sent.gradients <= 1.05 * codebooks
                assert sent.gradients < dense


def net_of_dense(bits: int) -> nn.Module:
    return Net(vocabulary=vocabulary(bits))


def ddp_without_a_broadcast_sends_codes_with_every_forward() -> None:  # the check of the claim above can fail
    parallel = DistributedDataParallel(net(8))
    with pytest.MonkeyPatch.context() as patch:
        sent = Sent(parallel, patch)
        loss_of(parallel, mine(next(batches(1))))
        assert sent.buffers >= sum(c.numel() for c in codes_of(parallel))


def ddp_without_buffers_trains_other_codes_and_the_check_says_so() -> None:
    parallel = DistributedDataParallel(net(4, seed=dist.get_rank()), broadcast_buffers=False)
    with pytest.raises(DistributedError, match="broadcast_codes"):
        check_same_codes(parallel)


def copies_and_pickles_keep_what_ddp_leaves_alone() -> None:
    model = broadcast_codes(net(8))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        parallel = DistributedDataParallel(other)
        assert not [name for name, _ in other.named_buffers() if name not in parallel.parameters_to_ignore]
    assert len(broadcast_codes(model)._ddp_params_and_buffers_to_ignore) == 2 * sum(1 for _ in names_of(model))


def names_of(model: nn.Module) -> Any:
    return (n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, RPQWeight))


def codes_that_change_are_sent_again() -> None:
    model = broadcast_codes(net(8))
    parallel = DistributedDataParallel(model)
    if not dist.get_rank():
        shift_codes(model)
    wanted = codes_of(net(8))
    broadcast_codes(parallel)
    shift_codes(model, -1)
    assert all(torch.equal(a, b) for a, b in zip(codes_of(model), wanted, strict=True))


# ------------------------------------------------------------------------------------------- losses of training


def training_in_ddp_is_training_in_one_process() -> None:
    same_losses(codebook_bits=9, stages=2, scale=True, signs=True)


def codebooks_that_layers_share_are_trained_in_ddp_as_in_one_process() -> None:
    same_losses(steps=6, tied=False, sharing="role", column_scale=True, grad_scale="sqrt")


def every_kind_of_codebooks_is_trained_in_ddp_as_in_one_process() -> None:
    for options in (
        {"codebook_bits": 8}, {"codebook_bits": 9, "tied": False, "scale": True},
        {"sharing": "role", "column_scale": True}, {"sharing": "shape", "grad_scale": "sqrt", "signs": True},
        {"sharing": "layer"}, {"stages": 2},
    ):  # fmt: skip
        same_losses(**options)


def same_losses(steps: int = 20, **options: Any) -> None:
    model = broadcast_codes(net(**options))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    wanted = expected(model, steps=steps)
    torch.testing.assert_close(losses(DistributedDataParallel(model), steps, split=True), wanted, **TOLERANCE)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def ddp_with_its_options_is_training_in_one_process() -> None:
    for options in ({"static_graph": True}, {"find_unused_parameters": True, "gradient_as_bucket_view": True}):
        model = broadcast_codes(net(8))
        wanted = expected(model, steps=4)
        parallel = DistributedDataParallel(model, **options)
        torch.testing.assert_close(losses(parallel, 4, split=True), wanted, **TOLERANCE)


def ddp_that_gathers_gradients_is_training_in_one_process() -> None:
    model = broadcast_codes(net(8))
    wanted = expected(model, steps=4)
    parallel = DistributedDataParallel(model)
    found = losses(parallel, 4, split=True, parts=2, between=parallel.no_sync)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def ddp_with_autocast_and_hooks_trains() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    def bf16(state, bucket):  # torch refuses its own by name where there is no NCCL
        return default_hooks.bf16_compress_hook(state, bucket)

    power = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    for state, hook in ((None, bf16), (power, powerSGD_hook.powerSGD_hook)):
        model = broadcast_codes(net(8, dtype=torch.float32))
        wanted = expected(model, steps=8)
        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(state, hook)
        found = losses(parallel, 8, split=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.1)
        assert found[-1] < found[0] - 0.5 * (wanted[0] - wanted[-1])
        check_same_parameters(model)
    model = broadcast_codes(net(8, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = expected(model, steps=4)
        found = losses(DistributedDataParallel(model), 4, split=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)


def moving_averages_of_a_cache_are_those_of_one_process() -> None:
    transformers = pytest.importorskip("transformers")
    from rpqfx.kv import KVPolicy, quantize_kv
    from rpqfx.kv.quantizer import ema

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    policy = KVPolicy(bits_per_value=3, window=6, sinks=2, chunk=8, codebook_dim=4, codebook_size=16, decay=0.9)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (4, 16), generator=draw)
    model = transformers.LlamaForCausalLM(config)
    model = quantize_kv(model, policy, calibration=[ids], progress=False).train()
    single = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    for one, x in ((parallel, mine(ids)), (single, ids)):
        with pytest.MonkeyPatch.context() as patch:
            if one is single:  # which adds up nothing over processes
                patch.setattr(ema, "_several_ranks", lambda: False)
            for _ in range(3):
                optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 1e-2)
                optimizer.zero_grad()
                one(input_ids=x, labels=x, use_cache=False).loss.backward()
                optimizer.step()
    wanted = single.state_dict()
    assert any("ema_sums" in name for name in wanted)
    for name, found in model.state_dict().items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


def check_same_parameters(model: nn.Module) -> None:
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter.detach())


CLAIMS = [
    codes_are_those_of_rank_0_after_a_broadcast,
    a_weight_without_a_seed_gives_none,
    signs_and_tiles_are_sent_and_compared_too,
    other_models_are_noticed_before_anything_is_sent,
    ddp_sends_no_codes_whatever_broadcast_buffers_says,
    ddp_without_a_broadcast_sends_codes_with_every_forward,
    ddp_without_buffers_trains_other_codes_and_the_check_says_so,
    copies_and_pickles_keep_what_ddp_leaves_alone,
    codes_that_change_are_sent_again,
    training_in_ddp_is_training_in_one_process,
    codebooks_that_layers_share_are_trained_in_ddp_as_in_one_process,
    ddp_with_its_options_is_training_in_one_process,
    ddp_that_gathers_gradients_is_training_in_one_process,
    ddp_with_autocast_and_hooks_trains,
]
LONG = [
    every_kind_of_codebooks_is_trained_in_ddp_as_in_one_process,
    moving_averages_of_a_cache_are_those_of_one_process,
]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.run(CLAIMS, RANKS, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_in_two_processes(claim: Callable[[], None], said: Path) -> None:
    found = processes.failure(said, claim, RANKS)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_at_length(ranks: int, tmp_path: Path) -> None:
    claims = [*LONG, *CLAIMS[9:]]
    processes.run(claims, ranks, tmp_path)
    assert not "".join(processes.failure(tmp_path, claim, ranks) for claim in claims)


def test_without_a_process_group_there_is_an_error_that_says_so() -> None:
    for call in (broadcast_codes, check_same_codes):
        with pytest.raises(DistributedError, match="init_process_group"):
            call(net())


def test_what_is_no_model_is_refused() -> None:
    for call in (broadcast_codes, check_same_codes):
        with pytest.raises(InputError, match=r"takes a torch\.nn\.Module"):
            call({})  # type: ignore[arg-type]
