"""Rewritten models in several processes, on torch.distributed; import it by name, as it takes a while."""

from rpqfx.distributed.agreement import broadcast_codes, check_same_codes
from rpqfx.distributed.sharding import fully_shard

__all__ = ["broadcast_codes", "check_same_codes", "fully_shard"]
