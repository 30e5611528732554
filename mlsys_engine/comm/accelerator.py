"""What serves a group's CUDA tensors: a process group of NCCL inside the native one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def nccl_maker(options: Any, backend_options: Any, global_ranks: Sequence[int]) -> Callable[[], Any] | None:
    """A function that makes the group's NCCL backend; None where torch has no NCCL or sees no GPU.

    The native group calls it when the first CUDA tensor comes, because making the backend starts threads. It
    connects at its first collective, through a part of the group's store of its own. `backend_options` is
    what the caller gave to `init_process_group(pg_options=...)`; a `ProcessGroupNCCL.Options` is used as it
    is.
    """
    # The number of devices is asked of NVML: torch.cuda.is_available() would make a later fork unsafe.
    if not dist.is_nccl_available() or torch.cuda.device_count() == 0:
        return None

    def make() -> Any:
        nccl = dist.ProcessGroupNCCL
        chosen = backend_options if isinstance(backend_options, nccl.Options) else nccl.Options()
        chosen._timeout = options.timeout
        chosen.global_ranks_in_group = list(global_ranks)
        chosen.group_name = options.group_id
        store = dist.PrefixStore("nccl", options.store)
        return nccl(store, options.group_rank, options.group_size, chosen)

    return make
