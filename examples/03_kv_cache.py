"""A quantized KV cache, in any model that calls scaled_dot_product_attention.

    python examples/03_kv_cache.py

Trains a byte-level language model on the documentation of Python for a minute, holds its KV cache at 3 bits a number,
and goes through a text token by token. Checks that this gives what the model gives on the whole sequence.
"""

import pydoc_data.topics
import time

import torch
import torch.nn.functional as F
from torch import nn

import rpqfx

WIDTH, HEADS, LAYERS, LENGTH = 128, 4, 3, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        places = torch.arange(start, start + ids.shape[1])
        return self.head(self.blocks(self.table(ids) + self.places(places)))


def main(seconds: float = 60.0) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    text = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8).long()
    train, held_out = text[:-40_000], text[-40_000:]

    def batch(source: torch.Tensor, size: int) -> torch.Tensor:
        starts = torch.randint(len(source) - LENGTH, (size,))
        return torch.stack([source[start : start + LENGTH] for start in starts])

    model = Bytes()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        ids = batch(train, 16)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    policy = rpqfx.KVPolicy(bits_per_value=3, window=32, sinks=4)
    small = rpqfx.quantize_kv(model, policy, calibration=[batch(train, 8) for _ in range(4)])

    test = batch(held_out, 16)
    with torch.no_grad():
        for name, net in (("plain cache", model), ("quantized", small)):
            loss = F.cross_entropy(net(test)[:, :-1].flatten(0, 1), test[:, 1:].flatten())
            print(f"{name}: {loss:.3f} nats a byte")

        cache = rpqfx.kv.CodebookCache.for_model(small)
        with cache.attended():
            steps = [small(test[:, t : t + 1], t) for t in range(LENGTH)]
        torch.testing.assert_close(torch.cat(steps, 1), small(test), rtol=1e-3, atol=1e-3)
    sizes = cache.nbytes()
    plain = 2 * LAYERS * 16 * LENGTH * WIDTH * 4
    print(f"{cache.total} tokens of 16 texts: {plain:,} bytes as they are,")
    print(f"{sizes['codes']:,} in codes and {sizes['window']:,} in the window")


if __name__ == "__main__":
    main()
