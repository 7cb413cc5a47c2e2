"""Training over several processes that share the weights between them (FSDP2), and what comes out of it.

wrapping    which weights are gathered together, and which stay gathered for a whole step
shards      weights, moments and averages in torch's distributed checkpoints, each process its own part
safe_reader how those are read, without running anything that they hold
training    the few places where transformers' Trainer has to act otherwise
export      a checkpoint of any kind to a plain model folder
"""

from casa.training.sharding.export import export_checkpoint
from casa.training.sharding.training import ShardedTraining
from casa.training.sharding.wrapping import shard_model, sharded_groups

__all__ = ["ShardedTraining", "export_checkpoint", "shard_model", "sharded_groups"]
