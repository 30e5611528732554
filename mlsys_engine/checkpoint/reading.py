"""Reads a checkpoint, after everything that can be checked has been checked."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from mlsys_engine.checkpoint import folder
from mlsys_engine.checkpoint.agreement import raise_together, rank_and_size
from mlsys_engine.checkpoint.contents import Contents, flatten, optimizer_key, rank_key, unflatten
from mlsys_engine.checkpoint.marker import Marker, check_files, read_marker, verify
from mlsys_engine.checkpoint.safe_reading import SafeLoadPlanner, SafeReader
from mlsys_engine.errors import CheckpointError
from mlsys_engine.memory.flat_shard import FlatShard


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory. `contents.own` is empty when the number of ranks has changed."""

    path: Path
    marker: Marker
    contents: Contents


def verify_together(path: Path, group: dist.ProcessGroup | None = None) -> Marker:
    """Checks every file of a checkpoint against its marker, the work shared among the ranks. A collective
    call.

    Raises the same CheckpointError on every rank; when the checkpoint is damaged and an older one of the same
    run is good, the message names that one as the way out.
    """
    rank, world_size = rank_and_size(group)
    error, marker = None, None
    try:
        marker = read_marker(path)
        check_files(path, marker, sorted(marker.files)[rank::world_size])
    except CheckpointError as found:
        error = _with_way_out(found, path)
    raise_together(error, group)
    assert marker is not None
    return marker


def load(path: str | Path, template: Contents, *, group: dist.ProcessGroup | None = None) -> Loaded:
    """Loads the checkpoint at `path`. Every rank calls it.

    `template` is the state of the freshly built training: its model says which names, shapes and dtypes are
    expected (its tensors, shards included, are filled in place), its optimizer which placement the state has.
    Values of another floating type come back as they were saved, in tensors of their own, for the runner to
    convert. Raises CheckpointError on every rank for damaged files, another model (both before any tensor is
    touched) or another optimizer.
    """
    path = Path(path)
    rank, world_size = rank_and_size(group)
    marker = verify_together(path, group)
    error, flat = None, {}
    try:
        metadata = SafeReader(path).read_metadata()
        own_rank = rank if marker.world_size == world_size else None
        flat = _targets(path, metadata, template, rank, own_rank)
    except CheckpointError as found:
        error = found
    raise_together(error, group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint.*")
        dcp.load(flat, storage_reader=SafeReader(path), planner=SafeLoadPlanner(), process_group=group)
    contents = unflatten(flat, rank)
    raise_together(_check_groups(path, contents, template), group)
    return Loaded(path=path, marker=marker, contents=contents)


def _targets(
    path: Path, metadata: Metadata, template: Contents, rank: int, own_rank: int | None
) -> dict[str, Any]:
    """A destination for every stored value that this rank wants: the template's tensor, or a new one."""
    stored = metadata.state_dict_metadata
    expected = flatten(template, rank)
    absent = {f"model/{name}" for name in template.elsewhere}
    _check_model(path, {key: record for key, record in stored.items() if key not in absent}, expected)
    targets: dict[str, Any] = {}
    for key, record in stored.items():
        if key.startswith("rank/") and (own_rank is None or key != rank_key(own_rank)):
            continue
        if key in absent or (key.startswith("optimizer/") and optimizer_key(key)[0] in template.elsewhere):
            continue
        if isinstance(record, BytesStorageMetadata):
            targets[key] = None
            continue
        target = expected.get(key)
        if target is None and key.startswith("optimizer/") and template.place is not None:
            target = template.place(*optimizer_key(key))
        of_another_precision = isinstance(target, torch.Tensor) and target.dtype != record.properties.dtype
        if (
            isinstance(target, torch.Tensor | FlatShard)
            and target.shape == record.size
            and not of_another_precision
        ):
            targets[key] = target
        else:  # as it was saved; or state that the optimizer has not created yet, and every rank has all of
            targets[key] = torch.empty(record.size, dtype=record.properties.dtype)
    return targets


def _check_model(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    names = {key for key in stored if key.startswith("model/")}
    wanted = {key for key in expected if key.startswith("model/")}
    for key in sorted(wanted - names) + sorted(names - wanted):
        has, lacks = ("the model", "the checkpoint") if key in wanted else ("the checkpoint", "the model")
        raise _other_model(path, f"{has} has {key.removeprefix('model/')!r}, which {lacks} lacks")
    for key in sorted(wanted):
        record, tensor = stored[key], expected[key]
        if not isinstance(record, TensorStorageMetadata) or not isinstance(tensor, torch.Tensor):
            continue
        if record.size != tensor.shape or not _convertible(record.properties.dtype, tensor.dtype):
            raise _other_model(
                path,
                f"{key.removeprefix('model/')!r} is {_describe(record.size, record.properties.dtype)} in the "
                f"checkpoint and {_describe(tensor.shape, tensor.dtype)} in the model",
            )


def _convertible(saved: torch.dtype, present: torch.dtype) -> bool:
    """Whether values go from one type to the other when a plan changes its precision."""
    return saved == present or {saved, present} <= {torch.float32, torch.bfloat16, torch.float16}


def _check_groups(path: Path, contents: Contents, template: Contents) -> CheckpointError | None:
    stored = [_group_shape(group) for group in contents.optimizer_groups]
    expected = [_group_shape(group) for group in template.optimizer_groups]
    if [names for _, names in stored] != [names for _, names in expected]:
        return CheckpointError(
            f"The checkpoint {path} has optimizer groups with other parameters than the optimizer has now.",
            "Optimizer state goes back to the groups that it came from.",
            "Build the optimizer with the same groups, or start without resume=.",
        )
    for (settings, _), (wanted, _) in zip(stored, expected, strict=True):
        # A scheduler adds "initial_lr" and the like; only what this optimizer reads must be there.
        if missing := wanted - settings:
            return CheckpointError(
                f"The checkpoint {path} is of another optimizer: "
                f"it does not set {', '.join(sorted(missing))}.",
                f"Its groups set {', '.join(sorted(settings))}.",
                "Use the optimizer that the checkpoint was saved with, or start without resume=.",
            )
    return None


def _group_shape(group: dict[str, Any]) -> tuple[set[str], list[str]]:
    return {key for key in group if key not in ("params", "initial_lr")}, list(group.get("params", ()))


def _other_model(path: Path, difference: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} is of another model: {difference}.",
        "Names and shapes of all parameters and buffers must agree, and types except for the precision.",
        "Build the model as it was when the checkpoint was saved, or start without resume=.",
    )


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _with_way_out(error: CheckpointError, path: Path) -> CheckpointError:
    """Adds the newest older checkpoint that is whole, when there is one."""
    for older in reversed(folder.list_checkpoints(path.parent)):
        if folder.step_of(older) >= folder.step_of(path):
            continue
        try:
            verify(older)
        except CheckpointError:
            continue
        return CheckpointError(
            error.given,
            error.expected,
            f"{older} is whole: delete the damaged folder to go on from it, or pass resume={str(older)!r}.",
        )
    return error
