"""The record of a run: its folder, agreed on by all ranks, and what rank 0 tells the trackers about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import DataLoader

from mlsys_engine import data, telemetry, tracking
from mlsys_engine.comm.launch import World
from mlsys_engine.errors import ConfigError, UserError
from mlsys_engine.plan import Plan

CHECKPOINTS = "checkpoints"  # below the run folder
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run as all ranks agree on it, before its first step."""

    id: str
    folder: Path
    checkpoint: Path | None  # what it goes on from

    @property
    def goes_on_in_place(self) -> bool:
        """Whether the checkpoint is one of this folder's own, so that its history is continued."""
        return self.checkpoint is not None and self.checkpoint.resolve().parent == self.checkpoints.resolve()

    @property
    def checkpoints(self) -> Path:
        """Where the run's own checkpoints lie."""
        return self.folder / CHECKPOINTS


def decided_by_rank_0(decide: Callable[[], T], world: World) -> T:
    """Calls `decide` on rank 0 and gives its result, or raises its UserError, on every rank."""
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = error
    if world.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def open_run_dir(run_dir: Path | None) -> tuple[str, Path]:
    """The run's id and folder: the given one, or a new one below runs/. Rank 0 calls it."""
    if run_dir is None:
        return tracking.new_run_dir()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir={str(run_dir)!r} cannot be created ({error.strerror or error}).",
            "The run's record and its checkpoints are kept in this folder.",
            "Pass a folder that rank 0 can write.",
        ) from None
    return run_dir.resolve().name, run_dir


def run_info(
    run: OpenRun,
    *,
    world: World,
    plan: Plan,
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
    loader: DataLoader[Any],
    resumed_from_step: int | None,
) -> tracking.RunInfo:
    """Everything that the trackers are told at the start; called on rank 0."""
    manifest = {
        **telemetry.environment(),
        "threads": {"num_threads": world.num_threads, "affinity": list(world.affinity)},
        "config": {**record.get("config", {}), "trainer": dict(settings)},
        "data": dict(record.get("data") or {"fingerprint": data.fingerprint(loader.dataset)}),
        "launch": {"launcher": world.launcher, "hosts": list(world.hosts)},
        "plan": json.loads(plan.to_json()),
    }
    return tracking.RunInfo(
        run_id=run.id,
        run_dir=run.folder,
        world_size=world.world_size,
        backend=world.backend,
        plan_hash=plan.hash,
        manifest=manifest,
        baselines=dict(record.get("baselines") or {}),
        resumed_from_step=resumed_from_step,
    )


def described(value: Any) -> Any:
    """`value` as JSON can hold it: plain values as they are, everything else by its repr."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    return repr(value)
