"""Rewritten models in several processes, on torch.distributed; import it by name, as it takes a while."""

from rpqfx.distributed.agreement import broadcast_codes, check_same_codes
from rpqfx.distributed.conversion import convert
from rpqfx.distributed.meta_start import materialize
from rpqfx.distributed.sharding import fully_shard
from rpqfx.distributed.split_heads import HeadParallel
from rpqfx.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel
from rpqfx.distributed.whole import load_full_state_dict

__all__ = [
    "ColwiseParallel",
    "HeadParallel",
    "RowwiseParallel",
    "broadcast_codes",
    "check_same_codes",
    "convert",
    "fully_shard",
    "load_full_state_dict",
    "materialize",
]
