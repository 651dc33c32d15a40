"""Claims on models of transformers whose attention multiplies out its own scores."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpqfx.errors import InputError, RewriteError
from rpqfx.kv import CodebookCache, KVPolicy, KVRule, attentions, quantize_kv
from tests import forks
from tests.kv.parts import in_parts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")

_COMMON = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def bloom() -> Any:
    """Folded heads, a bias by distance, ``baddbmm``."""
    return made("Bloom", hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)


def gpt_neo() -> Any:
    """A local attention, whose layers say their number otherwise than others do."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    return made("GPTNeo", **sizes, attention_types=[[["global", "local"], 1]], window_size=12, initializer_range=0.3)


def xglm() -> Any:
    """Folded heads, ``bmm``."""
    sizes = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}
    return made("XGLM", **sizes, init_std=0.3)


MODELS = [bloom, gpt_neo, xglm]


def made(name: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_COMMON, **sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def ids(seed: int, batch: int = 2, length: int = 28) -> Tensor:
    return torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def small_of(dense: Any, **values: Any) -> Any:
    policy = KVPolicy(
        **{"bits_per_value": 3, "window": 4, "sinks": 2, "codebook_size": 16, "chunk": 8, "codebook_dim": 4, **values}
    )
    return quantize_kv(dense, policy, calibration=[ids(9, 4)], fit=False, seed=0, progress=False).eval()


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_parts_are_as_all_at_once_and_a_wide_window_as_the_dense_model(make: Callable[[], Any]) -> None:
    dense, x = make(), ids(1)
    small = small_of(dense)
    whole = small(x, use_cache=False).logits
    assert not torch.allclose(whole, dense(x).logits, atol=1e-2)
    for sizes in ([1] * 28, [5, 9, 14], [14] + [1] * 14, [28]):
        torch.testing.assert_close(in_parts(small, x, sizes), whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small_of(dense, window=64)(x).logits, dense(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_beams_padding_and_generation_without_a_cache(make: Callable[[], Any]) -> None:
    small, x = small_of(make()), ids(4, 2, 20)
    options = {"max_new_tokens": 6, "do_sample": False}
    for more in ({}, {"num_beams": 3}):
        found = small.generate(x, **options, **more)
        assert torch.equal(found, small.generate(x, use_cache=False, **options, **more))
    seen = torch.ones_like(x)
    seen[1, :7] = 0
    wide = small_of(make(), window=64)
    padded = {"attention_mask": seen, **options}
    assert torch.equal(wide.generate(x, **padded), make().generate(x, **padded))


@torch.no_grad()
def test_copies_pickles_and_copied_caches_go_on() -> None:
    small, x = small_of(bloom()), ids(6)
    cache = CodebookCache.for_model(small)
    small(x[:, :20], past_key_values=cache)
    wanted = small(x[:, 20:], past_key_values=copy.deepcopy(cache)).logits
    for other in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(other(x[:, 20:], past_key_values=twin).logits, wanted)


@torch.no_grad()
def test_a_process_that_unpickles_a_model_makes_its_cache(tmp_path: Path) -> None:
    small, x = small_of(gpt_neo()), ids(6)
    torch.save((small, x, small(x, use_cache=False).logits), tmp_path / "whole.pt")
    done = forks.run(
        "import sys, torch\n"
        "from rpqfx.kv import CodebookCache\n"
        "small, x, wanted = torch.load(sys.argv[1], weights_only=False)\n"
        "found = small(x, past_key_values=CodebookCache.for_model(small)).logits\n"
        "torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)\n",
        str(tmp_path / "whole.pt"),
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_layers_that_are_skipped_keep_their_place_in_the_cache() -> None:
    small, x = small_of(gpt_neo(), rules=(KVRule("transformer.h.0.*", skip="as it is"),)), ids(1)
    assert len(attentions(small)) == 1
    whole = small(x, use_cache=False).logits
    torch.testing.assert_close(in_parts(small, x, [5, 9, 14]), whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_weights_of_attention_are_those_of_the_codes() -> None:
    dense, x = bloom(), ids(1)
    dense.set_attn_implementation("eager")
    small = small_of(dense)
    wanted = small(x, use_cache=False).logits
    out = small(x, use_cache=False, output_attentions=True)
    assert torch.equal(out.logits, wanted)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 28))


@torch.no_grad()
def test_a_static_cache_is_refused() -> None:
    small = small_of(gpt_neo())
    with pytest.raises(InputError, match=r"fixed size.*CodebookCache\.for_model"):
        small(ids(3), past_key_values=transformers.StaticCache(config=small.config, max_cache_len=64))


def test_two_attentions_in_one_call_are_refused_by_name() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.ProphetNetConfig(vocab_size=60, **sizes, num_encoder_layers=2, encoder_ffn_dim=48)
    config.num_encoder_attention_heads, config.is_decoder = 4, True
    model = transformers.ProphetNetForCausalLM(config).eval()
    with pytest.raises(RewriteError, match=r"layers\.0\.self_attn computes 2 attentions by products of its own"):
        small_of(model)
