"""What of a training goes into a checkpoint besides the Runner's state, and how it comes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlsys_engine import checkpoint
from mlsys_engine.comm.launch import World
from mlsys_engine.data import GlobalBatches
from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.plan.runner import Runner
from mlsys_engine.trainer import rng_state
from mlsys_engine.trainer.options import FitOptions
from mlsys_engine.trainer.record import CHECKPOINTS, OpenRun
from mlsys_engine.trainer.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The parts that change while training, except the step count, which the loop owns."""

    runner: Runner
    schedule: Schedule
    batches: GlobalBatches
    plan_hash: str
    world_invariant: bool
    seed: int
    world: World

    def contents(self) -> checkpoint.Contents:
        """Everything that the next step depends on, at a step boundary."""
        shared = {
            "scheduler": self.schedule.state_dict(),
            "data": self.batches.state_dict(),
            "seed": self.seed,
            "num_data_shards": self.runner.num_data_shards,
            "optimizer_class": type(self.runner.optimizer).__name__,
        }
        return checkpoint.Contents.of_runner_state(
            self.runner.state_dict(full=self.runner.holds_parts), shared=shared, own=rng_state.capture()
        )

    def restore(self, path: Path) -> tuple[int, list[str]]:
        """Loads the checkpoint at `path`: the step to go on from, and what a person should know about it."""
        template = checkpoint.Contents.of_runner_state(
            self.runner.state_dict(full=self.runner.holds_parts),
            shared={},
            own={},
            place=None if self.runner.holds_parts else self.runner.place_state,
            elsewhere=() if self.runner.holds_parts else self.runner.elsewhere,
        )
        loaded = checkpoint.load(path, template)
        contents, step = loaded.contents, loaded.marker.step
        self._check_optimizer(path, contents.shared)
        self.runner.load_state_dict(contents.runner_state())
        self.schedule.load_state_dict(contents.shared["scheduler"])
        self.batches.load_state_dict(contents.shared["data"])
        notes = [*_precisions(template, contents), *self._differences(loaded)]
        same_shards = contents.shared["num_data_shards"] == self.runner.num_data_shards
        if contents.own and same_shards:
            rng_state.restore(contents.own)
        else:
            rng_state.seed_generators(self.seed, self.runner.data_rank, step)
            if self.world_invariant and _leaves(contents.runner_state()) == _leaves(self.runner.state_dict()):
                notes.append(
                    f"It was saved by {loaded.marker.world_size} ranks and goes on with "
                    f"{self.world.world_size}, with the losses that it would have had there."
                )
                return step, notes
            notes.append(
                f"It was saved by {loaded.marker.world_size} ranks and goes on with {self.world.world_size}: "
                "model, optimizer, schedule and data position are restored; random numbers (dropout) are "
                "seeded anew, so the losses are not those of the run that was never stopped."
            )
        return step, notes

    def _check_optimizer(self, path: Path, shared: Any) -> None:
        saved, present = shared["optimizer_class"], type(self.runner.optimizer).__name__
        if saved != present:
            raise CheckpointError(
                f"The checkpoint {path} was saved with the optimizer {saved}; this training has {present}.",
                "The state of one optimizer means nothing to another.",
                f"Use optimizer={saved}, or start without resume=.",
            )

    def _differences(self, loaded: checkpoint.Loaded) -> list[str]:
        notes = []
        if loaded.marker.plan_hash != self.plan_hash and loaded.marker.world_size == self.world.world_size:
            notes.append(
                f"Its plan was {loaded.marker.plan_hash} and is {self.plan_hash} now: sums may be taken in "
                "another order, so losses need not agree to the last bit."
            )
        saved_seed = loaded.contents.shared["seed"]
        if saved_seed != self.seed:
            notes.append(f"seed={self.seed} has no effect: the data order goes on with seed {saved_seed}.")
        return notes


def _precisions(template: checkpoint.Contents, loaded: checkpoint.Contents) -> list[str]:
    """What is to be said when the model's weights were saved in another type than they have now."""
    types = {
        (_short(saved.dtype), _short(present.dtype))
        for name, present in template.model.items()
        if isinstance(saved := loaded.model[name], torch.Tensor) and saved.dtype != present.dtype
    }
    return [
        f"It was saved with {saved} weights and goes on with {present}." for saved, present in sorted(types)
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leaves(runner_state: dict[str, Any]) -> Any:
    """How many leaves the tree of a world-invariant runner has in all."""
    return runner_state.get("accumulation", {}).get("leaves_in_all")


def find_checkpoint(options: FitOptions, run_dir: Path, *, run_dir_given: bool) -> Path | None:
    """The checkpoint to resume from. Rank 0 calls it, so that all ranks follow one view of the disk.

    Raises ConfigError when the run folder has checkpoints and the caller wants to start anew in it.
    """
    newest = checkpoint.latest(run_dir / CHECKPOINTS) if run_dir_given else None
    if options.resume == "auto":
        return newest
    if options.resume is None:
        if newest is not None:
            raise ConfigError(
                f"{run_dir} holds checkpoints up to step {checkpoint.step_of(newest)}, and resume is off.",
                "A new training needs a run folder of its own, or both would be mixed in one.",
                "Pass resume='auto' to go on from there, or another run_dir.",
            )
        return None
    path = Path(options.resume)
    return checkpoint.latest(path / CHECKPOINTS) or path


def set_newer_aside(run: OpenRun) -> list[str]:
    """Moves checkpoints newer than the one resumed from out of the way of "auto"; says what was moved."""
    if run.checkpoint is None or not run.goes_on_in_place:
        return []
    moved = checkpoint.set_aside(run.checkpoints, checkpoint.step_of(run.checkpoint))
    return [f"Newer than that, and moved aside: {', '.join(path.name for path in moved)}."] if moved else []
