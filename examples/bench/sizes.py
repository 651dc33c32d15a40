"""Sizes of the two models that RPQ-pytorch reports, unmodified, with one codebook per attention head, float32.

    pip install 'rpqfx[examples]' && python examples/bench/sizes.py

Both models are built and rewritten on the meta device: nothing is allocated. MiB are 2**20 bytes, as RPQ-pytorch's
``model_size`` counts; GB are 1e9.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import results
import torch
from torch import nn

import rpqfx

THEIRS = {"ViT-giant/14, 336 px": 361.429, "OPT-66B": 5885.707}


def vit_giant() -> nn.Module:
    """The configuration of RPQ-pytorch's README, ``vit_giant_patch14_336``."""
    return _vit_module().ViT(
        image_size=336, patch_size=14, num_classes=1000, dim=1280, depth=32, heads=16, mlp_dim=5120, dropout=0.1,
        emb_dropout=0.1,
    )  # fmt: skip


def opt_66b() -> nn.Module:
    """transformers' OPT at the configuration of facebook/opt-66b."""
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=50272,
            hidden_size=9216,
            num_hidden_layers=64,
            ffn_dim=36864,
            num_attention_heads=72,
            max_position_embeddings=2048,
            word_embed_proj_dim=9216,
        )
    )


def _vit_module() -> ModuleType:
    """vit_pytorch's own file; importing the package asks for torchvision, which this model does not use."""
    package = importlib.util.find_spec("vit_pytorch")
    if package is None or not package.submodule_search_locations:
        raise ImportError("this needs the extra: pip install 'rpqfx[examples]'")
    spec = importlib.util.spec_from_file_location("vit", Path(package.submodule_search_locations[0]) / "vit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    rows = []
    for name, build in (("ViT-giant/14, 336 px", vit_giant), ("OPT-66B", opt_66b)):
        with torch.device("meta"):
            dense = build()
        for split in ("auto", "row"):
            report = rpqfx.report(rpqfx.rpqify(dense, rpqfx.Policy.from_scratch(num_subvectors="heads", split=split)))
            rows.append(
                {
                    "model": name,
                    "split": split,
                    "before": report.before,
                    "after": report.after,
                    "theirs_mib": THEIRS[name],
                }
            )
            print(rows[-1], flush=True)
    results.write("sizes", "python examples/bench/sizes.py", {"rows": rows})


if __name__ == "__main__":
    main()
