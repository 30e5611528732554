"""Writes a checkpoint so that it is either whole or not there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from mlsys_engine.checkpoint import folder
from mlsys_engine.checkpoint.agreement import raise_together, rank_and_size
from mlsys_engine.checkpoint.contents import Contents, flatten
from mlsys_engine.checkpoint.marker import SCHEMA_VERSION, FileRecord, Marker, record_file, write_marker
from mlsys_engine.errors import CheckpointError
from mlsys_engine.memory.flat_shard import FlatShard


def save(
    directory: str | Path,
    step: int,
    contents: Contents,
    *,
    plan_hash: str,
    keep_last: int = folder.DEFAULT_KEEP_LAST,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Saves `contents` as `<directory>/step-<step>` and returns that path. Every rank calls it, with one file
    system.

    All ranks write under a temporary name and fsync; each hashes its own files; rank 0 writes the marker,
    renames, and only then removes checkpoints beyond the newest `keep_last`. A rank that dies on the way
    leaves the former checkpoints as they were. Raises CheckpointError on every rank when the directory cannot
    be written.
    """
    directory = Path(directory)
    rank, world_size = rank_and_size(group)
    temporary, final = folder.temporary_path(directory, step), directory / folder.final_name(step)
    error = _prepare(directory, temporary) if rank == 0 else None
    raise_together(error, group)
    with _quiet_dcp():
        dcp.save(
            flatten(contents, rank),
            storage_writer=dcp.FileSystemWriter(temporary, sync_files=True),
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    files = _record_files(temporary, rank, world_size, group)
    if rank == 0:
        write_marker(
            temporary,
            Marker(
                schema_version=SCHEMA_VERSION,
                step=step,
                plan_hash=plan_hash,
                world_size=world_size,
                files=files,
            ),
        )
        folder.sync_directory(temporary)
        folder.publish(temporary, final)
        folder.prune(directory, keep_last)
    if world_size > 1:
        dist.barrier(group)  # no rank may go on, and perhaps leave, before the name is final
    return final


class _SavePlanner(dcp.DefaultSavePlanner):
    """DCP's planner, which asks a FlatShard for its boxes, but looks for them in tensors only."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return (
            found.__get_tensor_shard__(index)
            if isinstance(found, FlatShard)
            else super().lookup_object(index)
        )


def _prepare(directory: Path, temporary: Path) -> CheckpointError | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        folder.clear_temporary(temporary)
        temporary.mkdir()
    except OSError as error:
        return CheckpointError(
            f"The checkpoint directory {directory} cannot be written ({error.strerror or error}).",
            "Checkpoints go into <run_dir>/checkpoints, which rank 0 creates.",
            "Choose a run_dir on a disk that every rank can write, or free some space.",
        )
    return None


def _record_files(
    temporary: Path, rank: int, world_size: int, group: dist.ProcessGroup | None
) -> dict[str, FileRecord]:
    # Each rank hashes what it wrote ("__<rank>_..."), while it is still in its page cache; rank 0 the rest.
    names = sorted(path.name for path in temporary.iterdir())
    others = tuple(f"__{other}_" for other in range(1, world_size))
    mine = [n for n in names if (n.startswith(f"__{rank}_") if rank else not n.startswith(others))]
    records = {name: record_file(temporary / name) for name in mine}
    if world_size == 1:
        return records
    gathered: list[dict[str, FileRecord]] = [{}] * world_size
    dist.all_gather_object(gathered, records, group=group)
    return {name: record for part in gathered for name, record in part.items()}


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    # DCP announces, on every save, that it runs in a single process and that tensors are replicated.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint.*")
        yield
