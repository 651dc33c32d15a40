"""Caches of models whose layers keep more than keys and values, or hand theirs on to other layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rpqfx.errors import InputError
from rpqfx.kv import CodebookCache, KVPolicy, quantize_kv
from tests.kv.parts import in_parts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")

_BASE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}  # fmt: skip


def falcon_h1() -> Any:
    """Each layer has attention and a linear attention."""
    return _made("FalconH1", "FalconH1Config", _MAMBA)


def bamba() -> Any:
    """The first layer has a linear attention, the second attention."""
    options = {"attn_layer_indices": [1], **{k: v for k, v in _MAMBA.items() if k != "mamba_d_ssm"}, "mamba_n_heads": 8}
    return _made("Bamba", "BambaConfig", options)


def gemma4() -> Any:
    """The last two layers are handed the keys of those before."""
    types = ["sliding_attention", "full_attention"] * 2
    more = {"num_hidden_layers": 4, "layer_types": types, "num_kv_shared_layers": 2, "global_head_dim": 8}
    more |= {"sliding_window": 12, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8}
    return _made("Gemma4", "Gemma4TextConfig", more)


def _made(name: str, config: str, more: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    return kind(getattr(transformers, config)(**{**_BASE, **more})).eval()


def small_of(dense: Any) -> Any:
    policy = KVPolicy(bits_per_value=3, window=4, sinks=2, codebook_size=16, chunk=8, codebook_dim=4)
    return quantize_kv(dense, policy, calibration=[ids(9, 4)], fit=False, seed=0, progress=False).eval()


def ids(seed: int, batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_linear_attention_beside_the_attention_keeps_its_states() -> None:
    small, x = small_of(falcon_h1()), ids(1)
    whole = small(x, use_cache=False).logits
    torch.testing.assert_close(in_parts(small, x, [14] + [1] * 10), whole, rtol=1e-3, atol=1e-3)
    cache = CodebookCache.for_model(small)
    small(x[:, :14], past_key_values=cache)
    twin = copy.deepcopy(cache)
    twin.select(torch.tensor([1, 0]))
    twin.repeat(2)
    rows = torch.tensor([1, 1, 0, 0])
    steps = [small(x[rows][:, t : t + 1], past_key_values=twin).logits for t in range(14, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[rows, 14:], rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="no tokens are taken out of"):
        cache.crop(-1)
    assert cache.total == 14
    cache.reset()
    torch.testing.assert_close(small(x, past_key_values=cache).logits, whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("make", [falcon_h1, bamba, gemma4])
def test_beams_are_those_without_a_cache(make: Any) -> None:
    dense, x = make(), ids(2, length=14)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    if not torch.equal(dense.generate(x, **options), dense.generate(x, use_cache=False, **options)):
        small = quantize_kv(
            dense, KVPolicy(window=64, codebook_dim=4, codebook_size=16), calibration=[ids(9)], fit=False
        )
        assert torch.equal(small.eval().generate(x, **options), dense.generate(x, **options))
        return
    small = small_of(dense)
    assert torch.equal(small.generate(x, **options), small.generate(x, use_cache=False, **options))


@torch.no_grad()
def test_keys_of_another_layer_serve_fewer_queries() -> None:
    small, x = small_of(gemma4()), ids(3)
    whole = small(x, use_cache=False).logits
    for kept in (1, 5):
        for given in ({"use_cache": False}, {"past_key_values": CodebookCache.for_model(small)}):
            found = small(x, logits_to_keep=kept, **given).logits
            torch.testing.assert_close(found, whole[:, -kept:], rtol=1e-3, atol=1e-3)
