"""Models of transformers in several processes: their own plan is refused, and ours is what one process computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

import rpqfx
from rpqfx.distributed import ColwiseParallel, HeadParallel, RowwiseParallel
from rpqfx.errors import InputError
from rpqfx.kv import CodebookCache, KVPolicy, quantize_kv
from tests import processes

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not built in"),
]
POLICY = rpqfx.Policy(codebook_dim=4, codebook_bits=4, min_size=64, allow_growth=True)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def folder(name: str) -> Path:
    return Path(os.environ["RPQFX_TEST_FOLDER"], name)


def saved() -> None:
    if not dist.get_rank():
        llama().save_pretrained(folder("dense"))
        rpqfx.rpqify(llama(), POLICY).save_pretrained(folder("small"))
    dist.barrier()


def plans_of_transformers_are_refused_before_weights_are_loaded() -> None:
    rank = str(dist.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}.items():
            patch.setenv(name, value)
        config = rpqfx.RPQConfig(bits_per_weight=4)
        for name, options in (("small", {}), ("dense", {"quantization_config": config})):
            with pytest.raises(InputError, match=r"tp_plan=.*know no codebooks.*parallelize_module"):
                transformers.AutoModelForCausalLM.from_pretrained(folder(name), tp_plan="auto", **options)


def a_folder_is_opened_whole_and_split() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder("small")).eval()
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(split(model), ids), wanted, rtol=0, atol=1e-4)


def a_cache_of_codes_is_split_with_the_heads() -> None:
    policy = KVPolicy(bits_per_value=3, window=8, sinks=2, chunk=8, codebook_dim=4, codebook_size=16)
    ids = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(0))
    model = quantize_kv(llama(), policy, calibration=[ids], progress=False)
    wanted, generated = logits(model, ids), from_a_cache(model, ids)
    split(model, **{"model.layers.*.self_attn.kv_codes": HeadParallel()})
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(from_a_cache(model, ids), generated, rtol=0, atol=1e-4)


def split(model: nn.Module, **styles: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    layer = "model.layers.*."
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {layer + name: ColwiseParallel() for name in columns}
    plan |= {layer + name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return parallelize_module(model, mesh, {**plan, "lm_head": ColwiseParallel(output_layouts=Replicate()), **styles})


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def from_a_cache(model: nn.Module, ids: Tensor) -> Tensor:
    cache = CodebookCache.for_model(model)
    parts = (ids[:, :24], *ids[:, 24:].split(1, 1))
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


CLAIMS = [
    saved,
    plans_of_transformers_are_refused_before_weights_are_loaded,
    a_folder_is_opened_whole_and_split,
    a_cache_of_codes_is_split_with_the_heads,
]


def test_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPQFX_TEST_FOLDER", str(tmp_path))
    processes.run(CLAIMS, 2, tmp_path)
    found = "".join(processes.failure(tmp_path, claim, 2) for claim in CLAIMS)
    assert not found, found
