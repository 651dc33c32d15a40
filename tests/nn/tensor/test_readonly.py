"""What would change a weight that is made anew at each read is refused, through views, flags and ``out=`` too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import rpqfx
from rpqfx.errors import RewriteError

POLICY = rpqfx.Policy.from_scratch(codebook_dim=8, codebook_bits=4)


class Foreign(nn.Linear):
    """A subclass, whose weight is read as a VirtualWeight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def layer(kind: type[nn.Linear] = nn.Linear) -> Any:
    torch.manual_seed(0)
    return rpqfx.rpqify(kind(64, 96), POLICY)


def within_an_encoder() -> Any:
    """A layer that is read as a plain tensor."""
    torch.manual_seed(0)
    return rpqfx.rpqify(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), POLICY).linear1


READS = {"expanded": layer, "virtual": lambda: layer(Foreign), "fixed": within_an_encoder}

CHANGES: dict[str, Callable[[Any], Any]] = {
    "row": lambda w: w[0].zero_(),
    "row of data": lambda w: w.data[0].fill_(0),
    "row of data, added": lambda w: w.data[0].__iadd__(1),
    "view": lambda w: w.view(-1).zero_(),
    "view of a view": lambda w: w.view(-1)[3:5].mul_(2),
    "detached": lambda w: w.detach().zero_(),
    "data of a view": lambda w: w.view(-1).data.zero_(),
    "chunk": lambda w: w.chunk(2)[0].zero_(),
    "rows": lambda w: w.unbind(0)[0].zero_(),
    "flattened item": lambda w: w.flatten().__setitem__(0, 1.0),
    "narrowed": lambda w: w.narrow(0, 0, 3).mul_(2),
    "transposed": lambda w: w.T.zero_(),
    "swapped": lambda w: w.transpose(0, 1).zero_(),
    "orthogonal": lambda w: nn.init.orthogonal_(w),
    "whole": lambda w: w.clamp_(-0.1, 0.1),
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "out": lambda w: torch.add(torch.ones(96, 64), 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "relu": lambda w: F.relu(w, inplace=True),
    "dropout": lambda w: F.dropout(w, 0.5, True, True),
    "eye": lambda w: nn.init.eye_(w),
    "gradient": lambda w: setattr(w, "grad", torch.zeros(96, 64)),
    "hook": lambda w: w.register_hook(lambda grad: grad),
    "kept gradient": lambda w: w.retain_grad(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_change_through_a_view_is_refused(read: Callable[[], Any], change: Callable[[Any], Any]) -> None:
    held = read()
    before = held.weight_rpq()
    with torch.no_grad(), pytest.raises(RewriteError, match="a quantized weight, which is computed anew"):
        change(held.weight)
    assert torch.equal(held.weight_rpq(), before)


@pytest.mark.parametrize("change", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("read", [layer, lambda: layer(Foreign)], ids=["expanded", "virtual"])
def test_a_call_that_changes_its_argument_is_refused(read: Callable[[], Any], change: Callable[[Any], Any]) -> None:
    held = read()
    with (
        torch.set_grad_enabled("grad" in getattr(change, "__name__", "")),
        pytest.raises(RewriteError, match="codebooks"),
    ):
        change(held.weight)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_view_is_otherwise_a_tensor(read: Callable[[], Any]) -> None:
    held, x = read(), torch.randn(3, 64)
    plain = held.weight_rpq().detach()
    weight = held.weight
    assert torch.equal(weight[0] * 2 + weight[1], plain[0] * 2 + plain[1])
    assert torch.equal(torch.cat([weight[0], weight.view(-1)]), torch.cat([plain[0], plain.view(-1)]))
    torch.testing.assert_close(F.linear(x, weight.detach()), F.linear(x, plain))
    changed = weight[0].clone().zero_()
    assert type(changed) is Tensor and not changed.any()
    assert torch.equal(copy.deepcopy(weight.detach().view(-1)), plain.view(-1))
    assert torch.equal(pickle.loads(pickle.dumps(weight.detach()[0] + 0)), plain[0])
    assert weight.view(-1)[0].item() == plain[0, 0] and weight.detach()[0].tolist() == plain[0].tolist()
    (grad,) = torch.autograd.grad((weight[0] * 3).sum(), [held.weight_rpq.codebooks])
    want = torch.autograd.grad((held.weight_rpq()[0] * 3).sum(), [held.weight_rpq.codebooks])[0]
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("read", [layer, lambda: layer(Foreign)])
def test_an_array_of_a_weight_cannot_be_written_to(read: Callable[[], Any]) -> None:
    pytest.importorskip("numpy")
    weight = read().weight
    for array in (weight.detach().numpy(), weight.detach()[1:].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


@pytest.mark.parametrize("kind", [nn.Linear, Foreign])
def test_gradients_may_be_cleared(kind: type[nn.Linear]) -> None:
    layer(kind).weight.grad = None


@pytest.mark.parametrize("kind", [nn.Linear, Foreign])
@pytest.mark.parametrize(
    "method",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: prune.identity(m, "weight"),
        lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.5),
        lambda m: nn.utils.weight_norm(m),
        lambda m: nn.utils.spectral_norm(m),
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: nn.utils.parametrizations.spectral_norm(m),
        lambda m: nn.utils.parametrizations.orthogonal(m),
        lambda m: nn.utils.fusion.fuse_linear_bn_eval(m.eval(), nn.BatchNorm1d(96).eval()),
        lambda m: m.register_buffer("weight", torch.zeros(96, 64)),
        lambda m: setattr(m, "weight", None),
        lambda m: delattr(m, "weight"),
        lambda m: nn.utils.vector_to_parameters(torch.zeros(96 * 64), [m.weight]),
        lambda m: torch.func.functional_call(m, {"weight": torch.zeros(96, 64)}, (torch.zeros(1, 64),)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_nothing_is_left_behind_of_what_cannot_be_done(kind: type[nn.Linear], method: Callable[[Any], Any]) -> None:
    held, x = layer(kind), torch.randn(2, 64)
    keys, y = held.state_dict().keys(), held(x)
    with pytest.raises((RewriteError, KeyError, ValueError, TypeError)):
        method(held)
    assert held.state_dict().keys() == keys and torch.equal(held(x), y) and not held._forward_pre_hooks


def test_pruning_says_what_to_do() -> None:
    for kind in (nn.Linear, Foreign):
        with pytest.raises(RewriteError, match="before the model is rewritten"):
            prune.l1_unstructured(layer(kind), "weight", 0.5)
        with pytest.raises(RewriteError, match="before rewriting"):
            del layer(kind).weight


@pytest.mark.parametrize("kind", [nn.Linear, Foreign])
def test_codebooks_may_be_pruned(kind: type[nn.Linear]) -> None:
    held, x = layer(kind), torch.randn(2, 64)
    prune.l1_unstructured(held.weight_rpq, "codebooks", 0.5)
    kept = held.weight_rpq.codebooks_orig
    for _ in range(2):
        with torch.no_grad():
            kept.add_(0.1)
        y = held(x)
        torch.testing.assert_close(held.weight_rpq.codebooks, kept * held.weight_rpq.codebooks_mask)
        torch.testing.assert_close(y, F.linear(x, held.weight_rpq(), held.bias))
        y.sum().backward()
    assert kept.grad is not None and bool((kept.grad == 0).any())


class Rows(nn.Module):
    """Codebooks as the matrix of their entries, for optimisers of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, 8, 16, 8)

    def right_inverse(self, codebooks: Tensor) -> Tensor:
        return codebooks.flatten(0, 2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_muon_takes_codebooks_as_matrices() -> None:
    held, x = layer(), torch.randn(2, 64)
    y = held(x)
    parametrize.register_parametrization(held.weight_rpq, "codebooks", Rows())
    assert torch.equal(held(x), y)
    optimizer = torch.optim.Muon([p for p in held.parameters() if p.dim() == 2], lr=0.1)
    held(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(held(x), y)
    parametrize.remove_parametrizations(held.weight_rpq, "codebooks")
    assert held.weight_rpq.codebooks.shape == (1, 8, 16, 8) and isinstance(held.weight_rpq.codebooks, nn.Parameter)
