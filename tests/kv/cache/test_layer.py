"""The cache of a layer: attention as on what it holds, however it was filled, and no copy of it ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rpqfx.codebook.packing import code_bits
from rpqfx.errors import FormatError, InputError
from rpqfx.kv.attention import joint_softmax
from rpqfx.kv.attention.attend import Rope
from rpqfx.kv.cache import codes as code_cache
from rpqfx.kv.cache.layer import DRAFT, LayerStore
from rpqfx.kv.cache.positions import Positions
from tests.helpers import assert_same, generator, randn, seeds
from tests.kv.coders import PlainCoder, coders, decode, plain_coder

SIZES = {"sinks": 3, "window": 10, "chunk": 8}


def make(seed: int = 0, name: str = "layer 3", dtype: torch.dtype = torch.float64, **changes: Any) -> LayerStore:
    """Two heads of 8, with 3 slots and none for keys, 1 and 2 for values."""
    keys = plain_coder(seed, [3, 0], 4, 2, 5, dtype=dtype)
    values = plain_coder(seed + 7, [1, 2], 2, 4, 300, dtype=dtype)
    return LayerStore(keys, values, name=name, **{**SIZES, **changes})


def angles(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Rope:
    """Of pairs that are rotated, and stretched by a tenth as some models do."""
    angle = randn(seed, *shape, dtype=dtype)
    return torch.cat([angle.cos()] * 2, -1) * 1.1, torch.cat([angle.sin()] * 2, -1) * 1.1


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """transformers' ``x * cos + rotate_half(x) * sin``, on the first elements."""
    cos, sin = (part if part.dim() == 2 else part[:, None] for part in rope)
    some, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = some.chunk(2, -1)
    return torch.cat([some * cos + torch.cat([-right, left], -1) * sin, rest], -1)


def tokens(rope: Rope, part: slice) -> Rope:
    cos, sin = (x[..., part, :] for x in rope)
    return cos, sin


def held(store: LayerStore, k: Tensor, v: Tensor, rope: Rope | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a cache of so many tokens should hold, from the definition: codes after the sinks, the rest as it is."""
    total = k.shape[2]
    encoded = max(0, (total - store.sinks - store.window) // store.chunk * store.chunk)
    some = slice(store.sinks, store.sinks + encoded)
    both = []
    for coder, x, plain in ((store.keys.coder, before, k), (store.values.coder, v, v)):
        assert isinstance(coder, PlainCoder)
        far = decode(coder, *coder.encode((plain if x is None else x)[:, :, some]))
        if rope is not None and plain is k:
            far = rotate(far, tokens(rope, some))
        both.append(torch.cat([plain[:, :, : store.sinks], far, plain[:, :, store.sinks + encoded :]], 2))
    return both[0], both[1]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Of the newest tokens; zeros for those that see nothing."""
    repeat, (n, total) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * scale
    seen = torch.ones(n, total, dtype=torch.bool).tril(total - n).expand(scores.shape)
    if mask is not None:
        seen = seen & (mask if mask.dtype is torch.bool else mask > -torch.inf)
        scores = scores if mask.dtype is torch.bool else scores + mask
    p = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return p.masked_fill(~seen.any(-1, keepdim=True), 0) @ v


def spread(seed: int, total: int) -> list[int]:
    """Lengths of appends that come to so many tokens."""
    parts, g = [], generator(seed)
    while sum(parts) < total:
        parts.append(min(total - sum(parts), int(torch.randint(1, 30, (), generator=g))))
    return parts


# ------------------------------------------------------------------------------------------------ exactness


@settings(max_examples=20)
@given(seed=seeds, total=st.integers(1, 60), rotated=st.booleans())
def test_vectors_of_either_form_give_what_attention_on_codes_gives(seed: int, total: int, rotated: bool) -> None:
    store = make(seed)
    k, v, q = (randn(seed + i, 2, heads, total, 8, dtype=torch.float64) for i, heads in enumerate((2, 2, 4)))
    rope = angles(seed + 3, total, 3) if rotated else None
    start = 0
    for length in spread(seed, total):
        part = slice(start, start + length)
        start += length
        arrival = store.append(k[:, :, part], v[:, :, part], None if rope is None else tokens(rope, part))
        wanted = store.attend(q[:, :, part], 0.3, None, arrival)
        near = store.near(length, arrival, q.device)
        seen = torch.ones(length, start, dtype=torch.bool).tril(start - length)
        sides = [store.vectors(side, arrival) for side in ("keys", "values")]
        keys, values = ([x.repeat_interleave(2, 1) for x in side if x is not None] for side in sides)
        scores = torch.where(near, *(q[:, :, part] @ x.mT for x in (keys[0], keys[-1]))) * 0.3
        w = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        assert_same(wanted, w.where(near, 0) @ values[0] + w.where(~near, 0) @ values[-1])
        assert (len(keys) == 2) == bool(arrival.left)


@given(data=st.data())
@settings(max_examples=60)
def test_attention_is_that_of_what_is_held(data: st.DataObject) -> None:
    """Grouped heads, several queries, masks of both kinds, keys coded before their rotary embedding and after."""
    seed, batch = data.draw(seeds), data.draw(st.integers(1, 2))
    keys = data.draw(coders())
    slots = [data.draw(st.integers(0, 3)) for _ in range(keys.heads)]
    values = plain_coder(seed + 1, slots, 2, 3, 17)
    numbers = {
        "sinks": data.draw(st.integers(0, 4)),
        "window": data.draw(st.integers(0, 12)),
        "chunk": data.draw(st.sampled_from([8, 16])),
    }
    store = LayerStore(keys, values, **numbers)
    total = data.draw(st.integers(1, 60))
    queries, repeat = data.draw(st.integers(1, min(total, 9))), data.draw(st.integers(1, 3))
    half, rotated = data.draw(st.integers(1, max(1, keys.dim // 2))), keys.dim > 1 and data.draw(st.booleans())
    rope = angles(seed, *([batch] if data.draw(st.booleans()) else []), total, half) if rotated else None
    before = randn(seed, batch, keys.heads, total, keys.dim)
    k = before if rope is None else rotate(before, rope)
    v = randn(seed + 1, batch, keys.heads, total, values.dim)
    done = 0
    for length in spread(seed, total):
        part = slice(done, done + length)
        store.append(k[:, :, part], v[:, :, part], None if rope is None else tokens(rope, part))
        done += length
    q = randn(seed + 2, batch, keys.heads * repeat, queries, keys.dim)
    mask = torch.rand(batch, 1, queries, total, generator=generator(seed)) < 0.7
    if data.draw(st.booleans()):
        mask = torch.where(mask, randn(seed + 3, batch, 1, queries, total), -torch.inf)
    expected_k, expected_v = held(store, k, v, rope, before)
    for some in (None, mask):
        ours = store.attend(q, 0.3, some)
        assert_same(ours, attention(q, expected_k, expected_v, 0.3, some))
    assert store.total == total


@given(seeds, st.integers(30, 90), st.booleans())
@settings(max_examples=30)
def test_token_by_token_is_as_all_at_once(seed: int, total: int, rotated: bool) -> None:
    """What is in codes depends on the number of tokens only, and so does every result."""
    once, each, parts = make(seed), make(seed), make(seed)
    k, v, rope = (
        randn(seed, 1, 2, total, 8),
        randn(seed + 1, 1, 2, total, 8),
        angles(seed, total, 4) if rotated else None,
    )
    once.append(k, v, rope)
    for t in range(total):
        each.append(k[:, :, t : t + 1], v[:, :, t : t + 1], None if rope is None else tokens(rope, slice(t, t + 1)))
    done = 0
    for length in spread(seed, total):
        some = slice(done, done + length)
        parts.append(k[:, :, some], v[:, :, some], None if rope is None else tokens(rope, some))
        done += length
    assert once.encoded == each.encoded == parts.encoded == max(0, (total - 13) // 8 * 8)
    q = randn(seed + 2, 1, 4, 2, 8)
    assert_same(each.attend(q), once.attend(q))
    assert_same(parts.attend(q), once.attend(q))


def test_blocks_of_queries_and_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, q = randn(0, 1, 2, 70, 8), randn(1, 1, 2, 70, 8), randn(2, 1, 4, 30, 8)
    mask = torch.rand(1, 1, 30, 70, generator=generator(0)) < 0.5
    whole = make()
    whole.append(k, v)
    expected = whole.attend(q, mask=mask)
    monkeypatch.setattr(joint_softmax, "SCORE_ELEMENTS", 1000)
    monkeypatch.setattr(code_cache, "BLOCK", 24)
    parts = make()
    parts.append(k, v)
    assert_same(parts.attend(q, mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotated", [False, True])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, rotated: bool) -> None:
    """Results are rounded to the queries' dtype once; codes of keys rotated back may differ where two are as near."""
    store = make(dtype=torch.float32)
    k, v, q = (randn(seed, 1, 2, 60, 8, dtype=dtype) for seed in range(3))
    rope = angles(3, 60, 4, dtype=dtype) if rotated else None
    store.append(k, v, rope)
    assert store._plain[0].dtype is dtype
    ours = store.attend(q[:, :, :1])
    exact = make()
    exact.append(k.double(), v.double(), None if rope is None else (rope[0].double(), rope[1].double()))
    assert ours.dtype is dtype
    assert_same(ours.double(), exact.attend(q[:, :, :1].double()), tolerance=1e-2 if dtype.itemsize == 2 else 1e-4)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    store = make()
    store.append(randn(0, 2, 2, 40, 8), randn(1, 2, 2, 40, 8))
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1] = False
    for some in (mask, torch.zeros(2, 1, 1, 40, dtype=torch.float64).masked_fill(~mask, -torch.inf)):
        y = store.attend(randn(2, 2, 4, 1, 8), mask=some)
        assert bool((y[1] == 0).all()) and bool((y[0] != 0).all())


# --------------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The largest storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decode_step_makes_nothing_of_the_size_of_the_cache(dtype: torch.dtype, rotated: bool) -> None:
    """With compiled kernels (float32) and with torch's operators, whose blocks are of a fixed size."""
    keys, values = (plain_coder(seed, [16, 16], 8, 8, 16, books=4, dtype=dtype) for seed in (0, 1))
    store = LayerStore(keys, values, window=64, chunk=64)
    for start in range(0, 2**15, 2**13):
        rope = angles(start, 2**13, 32, dtype=dtype) if rotated else None
        store.append(randn(start, 1, 2, 2**13, 64, dtype=dtype), randn(start + 1, 1, 2, 2**13, 64, dtype=dtype), rope)
    full = 2 * 2**15 * 64 * dtype.itemsize
    new = [randn(seed, 1, 2, 1, 64, dtype=dtype) for seed in (2, 3)]
    with Largest() as largest:
        store.append(*new, angles(9, 1, 32, dtype=dtype) if rotated else None)
        store.attend(randn(4, 1, 4, 1, 64, dtype=dtype))
    assert largest.bytes <= full / 4


@given(seeds, st.integers(2, 700), st.integers(20, 300))
@pytest.mark.few(15)
def test_bytes_are_those_of_true_widths(seed: int, entries: int, total: int) -> None:
    """11 bits take 11 bits; room for more is an eighth and a little."""
    keys, values = plain_coder(seed, [3, 1], 4, 2, entries), plain_coder(seed, [2, 2], 4, 2, 2048, scaled=False)
    store = LayerStore(keys, values, **SIZES)
    store.append(randn(seed, 2, 2, total, 8), randn(seed, 2, 2, total, 8))
    encoded = store.encoded
    found = store.nbytes()
    assert found["codes"] == 2 * 4 * encoded * (code_bits(entries) + 11) // 8
    assert found["scales"] == 2 * 2 * encoded * 2
    kept = encoded if total <= DRAFT else 0  # as they are, besides, until the next append
    assert found["window"] == 2 * 2 * 2 * (total - encoded + kept) * 8 * 8
    room = 2 * 2 * 2 * (21 + kept) * 8 * 8
    assert store.allocated() <= room + (found["codes"] + found["scales"]) * 9 / 8 + 8 * 8 * (16 + 11 + 16)


# ---------------------------------------------------------------------------------------------- rows and states


@pytest.mark.parametrize("rotated", [False, True])
def test_rows_follow_beams(rotated: bool) -> None:
    rows = torch.tensor([2, 0, 0])
    k, v, q = randn(0, 3, 2, 50, 8), randn(1, 3, 2, 50, 8), randn(2, 3, 4, 1, 8)
    rope = angles(3, 3, 50, 4) if rotated else None
    store, other = make(), make()
    store.append(k, v, rope)
    other.append(k[rows], v[rows], None if rope is None else (rope[0][rows], rope[1][rows]))
    store.reorder(rows)
    assert_same(store.attend(q), other.attend(q))
    store.select(torch.tensor([1]))
    store.repeat(3)
    assert_same(
        store.attend(q[:1].expand(3, -1, -1, -1)), other.attend(q[:1].expand(3, -1, -1, -1))[1:2].expand(3, -1, -1, -1)
    )
    next_k, next_v = randn(4, 3, 2, 9, 8), randn(5, 3, 2, 9, 8)
    store.append(next_k, next_v, angles(6, 3, 9, 4) if rotated else None)
    assert store.total == 59


def test_the_newest_tokens_can_go_as_far_as_the_window() -> None:
    k, v, q = randn(0, 1, 2, 60, 8), randn(1, 1, 2, 60, 8), randn(2, 1, 2, 1, 8)
    store, other = make(), make()
    store.append(k[:, :, :55], v[:, :, :55], angles(0, 55, 4))
    store.append(randn(5, 1, 2, 3, 8), randn(6, 1, 2, 3, 8), angles(7, 3, 4))
    store.crop(-3)
    rope = angles(0, 60, 4)
    rope = (torch.cat([angles(0, 55, 4)[0], rope[0][55:]]), torch.cat([angles(0, 55, 4)[1], rope[1][55:]]))
    store.append(k[:, :, 55:], v[:, :, 55:], tokens(rope, slice(55, 60)))
    other.append(k, v, rope)
    assert_same(store.attend(q), other.attend(q))
    store.crop(100)
    assert store.total == 60 and store.encoded == 40
    least = 40 + store.sinks + store.window  # of which 40 are in codes when they come one by one
    with pytest.raises(InputError, match=rf"layer 3.*of 60 tokens {least - 1} were to stay, but 8 "):
        store.crop(least - 1)
    store.crop(least)
    assert store.total == least


@pytest.mark.parametrize("rotated", [False, True])
def test_a_state_restores(rotated: bool) -> None:
    """The next steps are the same to the last bit; the state shares no memory with the store."""
    k, v, q = randn(0, 2, 2, 50, 8), randn(1, 2, 2, 50, 8), randn(2, 2, 4, 1, 8)
    rope = angles(3, 2, 50, 4) if rotated else None
    store, other = make(), make()
    store.append(k[:, :, :40], v[:, :, :40], None if rope is None else tokens(rope, slice(0, 40)))
    state = store.state()
    outs = []
    for one in (store, other):
        if one is other:
            one.restore(state)
        one.append(k[:, :, 40:], v[:, :, 40:], None if rope is None else tokens(rope, slice(40, 50)))
        outs.append(one.attend(q))
    assert torch.equal(*outs)
    other.reset()
    other.restore(make().state())
    assert other.total == 0


def test_states_of_others_are_refused() -> None:
    store = make()
    store.append(randn(0, 1, 2, 50, 8), randn(1, 1, 2, 50, 8), angles(2, 50, 4))
    state = store.state()
    with pytest.raises(FormatError, match=r"layer 3, keys.*other codebooks"):
        make(seed=1).restore(state)
    for key in state:
        broken = make()
        with pytest.raises(FormatError, match="layer 3"):
            broken.restore({name: x for name, x in state.items() if name != key})
        assert broken.total == 0
    with pytest.raises(FormatError, match="layer 3, keys: codes saved are above"):
        make().restore({**state, "keys.codes": torch.full_like(state["keys.codes"], 255)})
    with pytest.raises(FormatError, match=r"layer 3: .* 3 sinks"):
        make(sinks=2).restore(state)


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_refused_and_the_layer_named() -> None:
    store = make()
    good = randn(0, 1, 2, 4, 8)
    with pytest.raises(InputError, match="layer 3: the cache is empty"):
        store.attend(good)
    for bad in (torch.nan, torch.inf):
        spoilt = good.clone()
        spoilt[0, 1, 2, 3] = bad
        with pytest.raises(InputError, match="layer 3, keys hold NaN"):
            store.append(spoilt, good)
        with pytest.raises(InputError, match="layer 3, values hold NaN"):
            store.append(good, spoilt)
    assert store.total == 0
    store.append(good, good)
    for k, v, message in (
        (good[..., :6], good, "layer 3, keys are"),
        (good, good[:, :1], "layer 3, values are"),
        (good[:, :, :2], good, "layer 3: keys are"),
        (good.expand(3, -1, -1, -1), good.expand(3, -1, -1, -1), "1 samples"),
        (good[:, :, :0], good[:, :, :0], "layer 3: keys are"),
    ):
        with pytest.raises(InputError, match=message):
            store.append(k, v)
    with pytest.raises(InputError, match="or all without one, got some of each"):
        store.append(good, good, angles(0, 4, 4))
    for q in (good[:, :1], good[..., :4], good.expand(2, -1, -1, -1), randn(0, 1, 2, 5, 8)):
        with pytest.raises(InputError, match=r"layer 3: .*quer"):
            store.attend(q)
    with pytest.raises(InputError, match="layer 3: a mask"):
        store.attend(good, mask=torch.ones(1, 1, 4, 9, dtype=torch.bool))
    assert store.total == 4


def test_bad_angles_are_refused() -> None:
    good, (cos, sin) = randn(0, 1, 2, 4, 8), angles(0, 4, 4)
    for rope in (
        (cos[:3], sin[:3]),
        (cos.repeat(1, 2), sin.repeat(1, 2)),
        (cos + torch.arange(8), sin),
        (cos[:, :7],) * 2,
    ):
        with pytest.raises(InputError, match="layer 3"):
            make().append(good, good, rope)


@pytest.mark.parametrize("numbers", [{"sinks": -1}, {"window": -1}, {"chunk": 12}, {"chunk": 0}])
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(InputError, match="layer 3"):
        make(**numbers)


def test_coders_that_do_not_divide_are_refused() -> None:
    coder = plain_coder(0, [2], 2, 4, 16, basis=False)
    coder.dim = 6
    with pytest.raises(InputError, match="layer 3, keys: vectors of 6"):
        LayerStore(coder, plain_coder(0, [2], 2, 4, 16), name="layer 3")
    with pytest.raises(InputError, match="1 heads of keys and 2"):
        LayerStore(plain_coder(0, [2], 2, 4, 16), plain_coder(0, [2, 1], 2, 4, 16), name="layer 3")


# ------------------------------------------------------------------------------------------------ positions


def test_layers_share_positions() -> None:
    """Rows that agree are kept once, and so are tokens that several layers put."""
    positions = Positions()
    stores = [make(seed, positions=positions) for seed in (0, 1)]
    k, rope = randn(0, 2, 2, 40, 8), angles(0, 40, 4)
    for store in stores:
        store.append(k, k, rope)
        store.append(k, k, (rope[0].expand(2, -1, -1), rope[1].expand(2, -1, -1)))
        assert store.nbytes()["positions"] == 0
    assert positions.length == 80 and positions.nbytes() == 2 * 80 * 4 * 8
    own = make(0)
    own.append(k, k, rope)
    own.append(k, k, rope)
    q = randn(1, 2, 2, 1, 8)
    assert_same(stores[0].attend(q), own.attend(q))
    assert own.nbytes()["positions"] == positions.nbytes()


def test_rows_of_positions_part_when_they_differ() -> None:
    positions, (cos, sin) = Positions(torch.float32), angles(0, 2, 5, 4)
    positions.put(0, cos[:1], sin[:1], "layer 3")
    positions.put(5, cos, sin, "layer 3")
    found = positions.get(0, 10)[0]
    assert found.dtype is torch.float32 and found.shape == (2, 10, 4)
    assert_same(found[:, :5], cos[:1, :, :4].expand(2, -1, -1).float())
    assert_same(found[:, 5:], cos[:, :, :4].float())
    with pytest.raises(InputError, match="layer 3: positions of 10 tokens"):
        positions.put(11, cos, sin, "layer 3")
    with pytest.raises(InputError, match="layer 3: cos is"):
        positions.put(10, cos[..., [0, 1, 4, 5]], sin[..., [0, 1, 4, 5]], "layer 3")
