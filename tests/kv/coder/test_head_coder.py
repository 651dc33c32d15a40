"""Claims on codes of a layer's heads."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpqfx.errors import SpecError
from rpqfx.kv.coder.head_coder import HeadCoder


def random_coder(seed: int, joint: bool = True, scaled: bool = False) -> HeadCoder:
    """Of three heads of 8, with fewer coordinates than channels and different numbers of stages."""
    generator = torch.Generator().manual_seed(seed)
    joint = joint and not scaled  # heads with scales have codes of their own
    coder = HeadCoder(3, 8, codebook_dim=4, codebook_size=6, joint=joint, normalize=scaled)
    parts, width = (1, 24) if joint else (3, 8)
    kept = 5 if joint else 1
    stages = torch.randint(3, (parts * kept,), generator=generator).tolist()
    stages[-1] = 2
    maps = torch.randn(parts, width, width, generator=generator) + 3 * torch.eye(width)
    books = nn.Parameter(torch.randn(2, 1, 6, 4, generator=generator))
    coder.set_transform(
        maps[:, :, : kept * 4], torch.linalg.inv(maps)[:, : kept * 4], torch.randn(3, 8, generator=generator),
        stages, books, 4,
    )  # fmt: skip
    return coder


def vectors(seed: int, length: int = 5) -> Tensor:
    return torch.randn(2, 3, length, 8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_the_definition(seed: int, joint: bool, scaled: bool) -> None:
    coder, x = random_coder(seed, joint, scaled), vectors(seed + 1)
    codes, scale = coder.encode(x)
    basis = coder.basis
    assert basis is not None
    y = torch.zeros(2, 3, 5, basis.shape[1])
    for head, (b, t) in itertools.product(range(3), itertools.product(range(2), range(5))):
        part = 0 if coder.parts == 1 else head
        for slot in range(coder.head_slots[part], coder.head_slots[part + 1]):
            group, book = coder.slot_groups[slot], coder.slot_books[slot]
            y[b, head, t, group * 4 : group * 4 + 4] += coder.books[book, int(codes[b, slot, t])]
    expected = y @ basis
    expected = expected if scale is None else expected * scale[..., None]
    assert coder.mean is not None
    torch.testing.assert_close(coder.decode(codes, scale), expected + coder.mean[:, None], rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_the_result_is_what_codes_stand_for_and_gradients_pass_straight(seed: int, joint: bool, scaled: bool) -> None:
    coder, x = random_coder(seed, joint, scaled).train(), vectors(seed + 1).requires_grad_()
    made, loss = coder(x)
    torch.testing.assert_close(made, coder.decode(*coder.encode(x.detach())))
    direction = torch.randn_like(made)
    (grad,) = torch.autograd.grad((made * direction).sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, direction)
    loss.backward()
    assert coder.quantizer.codebooks.grad is not None


@pytest.mark.few(25)
@given(st.integers(0, 2**31))
def test_a_state_makes_any_coder_the_same(seed: int) -> None:
    coder, other, x = random_coder(seed), HeadCoder(3, 8, codebook_dim=4, codebook_size=6, stages=2), vectors(seed)
    other.load_state_dict(coder.state_dict())
    for twin in (other, copy.deepcopy(coder), pickle.loads(pickle.dumps(coder))):
        assert torch.equal(twin.encode(x).codes, coder.encode(x).codes)
        assert torch.equal(twin(x)[0], coder(x)[0])


@pytest.mark.parametrize("strided", [False, True])
def test_without_transform_sub_vectors_are_channels(strided: bool) -> None:
    coder = HeadCoder(2, 6, codebook_dim=3, codebook_size=4, stages=1, transform=False, strided=strided)
    x = torch.arange(12.0).view(1, 2, 1, 6)
    y, scale = coder.to_code_space(x)
    first = [0, 2, 4] if strided else [0, 1, 2]
    assert y[0, 0, :3].tolist() == first
    assert scale is None
    assert torch.equal(coder.from_code_space(y, None), x)


def test_with_as_many_entries_as_vectors_nothing_is_lost() -> None:
    coder, x = HeadCoder(2, 4, codebook_dim=4, codebook_size=16, stages=1, transform=False), torch.randn(1, 2, 8, 4)
    coder.fit(x)
    torch.testing.assert_close(coder(x)[0], x)


@pytest.mark.parametrize("values", [{"codebook_dim": 5}, {"codebook_dim": 4, "strided": True}])
def test_numbers_that_do_not_go_together(values: dict[str, int]) -> None:
    with pytest.raises(SpecError):
        HeadCoder(3, 8, **values)
