"""Claims on padded and empty batches of models whose blocks were made routed, and on arguments of their calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpqfx import RoutePolicy, route
from rpqfx.errors import InputError
from rpqfx.routing import RoutedAutoregressiveAttention
from tests.routing.rewrite.models import LENGTH, WIDTH, encoder, jolted, x_of

SOME = RoutePolicy(feed_forward=5, attention=6)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def nested() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 40, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval()


def test_torchs_nested_tensors_are_not_made_of_padded_batches() -> None:
    dense = nested()
    small, x = jolted(route(dense, SOME)).eval(), x_of(0)
    hidden = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [15]])
    with torch.no_grad():
        found = small(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(found[~hidden], small(x, src_key_padding_mask=hidden)[~hidden], rtol=1e-4, atol=1e-5)
    assert dense.use_nested_tensor


@pytest.mark.parametrize(("feed_forward", "attention"), [(2, 3), (2, None), (None, 3)])
@torch.no_grad()
def test_padding_on_either_side_leaves_a_sample_what_it_is_alone(feed_forward: Any, attention: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    policy = RoutePolicy(feed_forward=feed_forward, attention=attention, window=6)
    small = jolted(route(transformers.LlamaForCausalLM(config).eval(), policy))
    x, none = torch.randint(1, 50, (1, 20)), torch.zeros(1, 5, dtype=torch.int64)
    alone = small(x).logits
    for parts, some in (((none, x), slice(5, 25)), ((x, none), slice(0, 20))):
        mask = torch.cat([(part > 0).long() for part in parts], 1)
        found = small(torch.cat(parts, 1), attention_mask=mask).logits[:, some]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_windows_of_the_causal_block_begin_at_the_first_token() -> None:
    block = RoutedAutoregressiveAttention(
        WIDTH, num_heavy_tokens_q=2, num_heavy_tokens_kv=2, light_window_size=6, light_heads=2, heavy_heads=2,
        light_dim_head=8, heavy_dim_head=8,
    )  # fmt: skip
    x = x_of(1)
    padded = torch.cat([x_of(2)[:, :7], x], 1)
    mask = (torch.arange(LENGTH + 7) >= 7).expand(len(x), -1)
    torch.testing.assert_close(block(padded, mask)[:, 7:], block(x), rtol=1e-4, atol=1e-5)
    assert block(x[:0]).shape == (0, LENGTH, WIDTH) and block(x[:0], mask[:0, :LENGTH]).shape == (0, LENGTH, WIDTH)


@pytest.mark.parametrize("shape", [(0, LENGTH), (2, 0)])
def test_empty_batches_are_what_the_model_makes_of_them(shape: tuple[int, int]) -> None:
    for dense in (encoder().train(), nested()):
        x = torch.randn(*shape, WIDTH)
        with torch.enable_grad():
            assert route(dense, SOME)(x).shape == dense(x).shape == x.shape


class Told(nn.Module):
    """Attention that takes more by name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0, sparsity: Any = None, state: Any = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]


def test_arguments_of_which_nothing_is_known_are_refused_by_name() -> None:
    small, x = route(Told(), RoutePolicy(attention=6)), x_of(0)
    assert small(x, scale=2.0).shape == x.shape
    with pytest.raises(InputError, match="sparsity="):
        small(x, sparsity=object())
    with pytest.raises(InputError, match="unclear which axis"):
        small(x, state={"keys": torch.randn(3, 2, LENGTH, 4)})
