"""The recorder's content on demand; what writes it by itself is in docs/guide/collectives.md."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from mlsys_engine.native import load_comm


def dump(directory: str | Path) -> Path:
    """Writes this rank's last operations to `directory`/hang_rank_<rank> and returns that path.

    Works at any time and from any thread, without a group too. `mlsys doctor --hang` explains the files of
    all ranks in words; torch.distributed.flight_recorder.fr_trace reads them as well.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return Path(load_comm().dump(str(directory), rank))
