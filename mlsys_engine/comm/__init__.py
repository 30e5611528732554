"""The collectives: importing this registers the c10d backend "mlsys".

`torch.distributed.init_process_group("mlsys")` is then all that DDP, FSDP2, DTensor and DCP need for CPU
tensors (CUDA tensors are refused in words). The functions here are torch.distributed's, plus `empty` (tensors
in shared memory), `counters`, `poison` and `reconfigure`. Nothing is opened, started or loaded before a group
is created.
"""

from mlsys_engine.comm.arena import empty, in_arena
from mlsys_engine.comm.backend import register
from mlsys_engine.comm.compressed import COMPRESSIONS, all_reduce_compressed, num_hosts
from mlsys_engine.comm.counters import Counters, counters, describe_transports
from mlsys_engine.comm.faults import poison
from mlsys_engine.comm.functional import (
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    gather,
    recv,
    reduce,
    reduce_scatter,
    scatter,
    send,
)
from mlsys_engine.comm.launch.regroup import reconfigure
from mlsys_engine.comm.recorder import dump
from mlsys_engine.comm.sharded import (
    RuleTable,
    reduce_scatter_optimize_all_gather,
    reduce_shard,
    share_shards,
)
from mlsys_engine.comm.tree import all_reduce_tree, reduce_scatter_tree
from mlsys_engine.errors import CollectiveMismatchError, CollectiveTimeoutError, PeerFailedError

__all__ = [
    "COMPRESSIONS",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Counters",
    "PeerFailedError",
    "RuleTable",
    "all_gather",
    "all_reduce",
    "all_reduce_compressed",
    "all_reduce_tree",
    "all_to_all",
    "barrier",
    "broadcast",
    "counters",
    "describe_transports",
    "dump",
    "empty",
    "gather",
    "in_arena",
    "num_hosts",
    "poison",
    "reconfigure",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_optimize_all_gather",
    "reduce_scatter_tree",
    "reduce_shard",
    "scatter",
    "send",
    "share_shards",
]

register()
