"""The loss is that of a loop over tokens and slots, and each part's gradients go where they should."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from torch import Tensor

from tests.helpers import generator, randn, seeds
from tests.kv.helpers import arguments, book, made, naive_rests


def naive_loss(quantizer: Any, x: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Without the weights of its two parts."""
    total = torch.zeros((), dtype=x.dtype)
    tokens = max(1, int(mask.sum()))
    for token in mask.nonzero()[:, 0].tolist():
        rests = naive_rests(quantizer, x[token], codes[token])
        for rest, code, group, stage in zip(rests, codes[token].tolist(), *quantizer.slots, strict=True):
            users = sum(own > stage for own in quantizer.layout.stages)
            total = total + (rest - book(quantizer, stage, group)[code]).square().sum() / (tokens * users)
    return total


@given(arguments(), seeds)
def test_commitments_of_all_stages_add_up(given: dict[str, Any], seed: int) -> None:
    quantizer = made(seed, **given, commitment=0.3)
    x = randn(seed + 1, 4, given["dim"]).requires_grad_()
    mask = torch.rand(4, generator=generator(seed)) < 0.6
    out = quantizer(x, mask)
    scale = x.detach().std(1, correction=0, keepdim=True) if given["normalize"] else torch.ones(4, 1)
    scale[scale == 0] = 1
    leaf = x.detach().clone().requires_grad_()
    exact = naive_loss(quantizer, leaf / scale, out.codes.long(), mask)
    torch.testing.assert_close(out.loss.double(), 1.3 * exact.detach())
    if exact.requires_grad:
        theirs = torch.autograd.grad(0.3 * exact, leaf)[0]
        torch.testing.assert_close(torch.autograd.grad(out.loss, x)[0], theirs)


@given(arguments(), seeds)
def test_entries_are_drawn_to_what_chose_them(given: dict[str, Any], seed: int) -> None:
    """The gradient of an entry is that of the squared distances of its own points, whatever the commitment."""
    quantizer = made(seed, **given, commitment=0.7)
    x = randn(seed + 1, 5, given["dim"])
    out = quantizer(x)
    exact = torch.zeros_like(quantizer.codebooks)
    scale = x.std(1, correction=0, keepdim=True) if given["normalize"] else torch.ones(5, 1)
    scale[scale == 0] = 1
    for vector, codes in zip(x / scale, out.codes.long(), strict=True):
        rests = naive_rests(quantizer, vector, codes)
        for rest, code, group, stage in zip(rests, codes.tolist(), *quantizer.slots, strict=True):
            users = sum(own > stage for own in quantizer.layout.stages)
            where = (stage // given["shared_stages"], 0 if given["shared"] else group, code)
            exact[where] += 2 * (quantizer.codebooks.detach()[where] - rest) / (5 * users)
    if quantizer.layout.count:
        torch.testing.assert_close(torch.autograd.grad(out.loss, quantizer.codebooks)[0], exact)


def test_averaged_codebooks_have_no_part_in_the_loss() -> None:
    x = randn(1, 6, 8, dtype=torch.float32)
    plain, averaged = (
        made(0, 8, dtype=torch.float32, codebook_size=4, commitment=0.5, **more) for more in ({}, {"decay": 0.9})
    )
    torch.testing.assert_close(plain(x).loss, averaged.eval()(x).loss * 3)
    assert not averaged(x).loss.requires_grad
