"""``quantize_(model, RPQConfig(...))`` of torchao: its registry of methods, and what ours does with a module.

torchao hands over one module at a time, so each weight is fitted to its own values, without data. Importing this module
registers; it needs torchao, the extra ``torchao``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ImportError("this needs torchao, the extra: pip install 'rpqfx[torchao]'") from error

from rpqfx.conversion.rpqify import rpqify
from rpqfx.errors import PolicyError
from rpqfx.graph.sites import is_rewritten
from rpqfx.policies.policy import Policy, Rate
from rpqfx.validation.values import check_seed, shown


@dataclasses.dataclass
class RPQConfig(AOBaseConfig):
    """What ``quantize_`` of torchao does with the modules that its filter lets through, or that ``FqnToConfig`` names.

    A module is rewritten in place by ``rpqify``, with everything that is in it: a Linear alone, which is what the
    filter lets through unless another is given; or with ``filter_fn=lambda module, name: name == ""`` the whole model
    at once, which keeps tied weights tied and spreads bits over all of them.

    Args:
        bits_per_weight: Codes, codebooks and factors together, above 0 and at most 16.
        policy: A ``Policy`` in place of it; one that fits.
        seed: Of the fits.

    Raises:
        PolicyError: If there is neither a number of bits nor a policy, or both.
        InputError: If the seed is none.
    """

    bits_per_weight: float | None = None
    policy: Policy | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if (self.bits_per_weight is None) == (self.policy is None):
            raise PolicyError(
                "RPQConfig takes bits_per_weight, as in RPQConfig(bits_per_weight=4), or a policy; give one"
            )
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise PolicyError(f"policy is a Policy, got {shown(self.policy)}")
        if self.bits_per_weight is not None:
            Rate(self.bits_per_weight)  # which checks it


@register_quantize_module_handler(RPQConfig)
def _quantize(module: nn.Module, config: RPQConfig) -> nn.Module:
    """Rewrites one module in place; see ``RPQConfig``."""
    if is_rewritten(module):  # shared by several modules, and found a second time
        return module
    bits: Any = config.bits_per_weight
    policy = Policy.pretrained(bits, embedding_bits=bits) if config.policy is None else config.policy
    try:
        return rpqify(module, policy, inplace=True, seed=config.seed)
    except PolicyError as error:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in module.named_parameters())
        raise PolicyError(
            f"a {type(module).__name__} ({shapes}) cannot be quantized as this RPQConfig says: {error}; leave "
            "it out with the filter_fn of quantize_, or with None in FqnToConfig"
        ) from error
