"""Pipeline parallelism: the model in stages, one run of blocks after the other, each on ranks of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline import Schedule, ScheduleError, schedules, split
from mlsys_engine.pipeline.partial import Units, find_units
from mlsys_engine.pipeline.runtime import build_planned
from mlsys_engine.plan import Plan
from mlsys_engine.strategies.base import PlanOptions, SampleNeededError, Subject
from mlsys_engine.strategies.data_parallel import DataParallel
from mlsys_engine.strategies.mesh import build_mesh, plan_mesh
from mlsys_engine.trace import Trace

BALANCED = "balanced"
MICROBATCHES_A_RANK = 2


@dataclass(frozen=True)
class PipelineParallel:
    """Every rank holds one stage of the model, or several, and runs its part of each microbatch.

    An unchanged model runs its own forward; what the blocks of other stages would return comes in messages.
    Each batch of a step is cut along dimension 0 into microbatches, which keep all stages busy. All ranks are
    fed the same batches. Numbers are those of one process that adds up the microbatches, to the last bit.
    """

    name: ClassVar[str] = "pipeline_parallel"

    stages: int | None = None
    """Ranks that the model is divided over; None: all of the world."""
    schedule: str | Schedule = "1f1b"
    """One of mls.pipeline.schedules.SCHEDULES, or a Schedule such as mls.pipeline.search finds."""
    microbatches: int | None = None
    """Pieces that each batch is cut into; None: twice the stages, or as many as a given schedule has."""
    split: str | Sequence[str] = BALANCED
    """Where stages begin: "balanced" by FLOPs, or the names of the modules that begin the second stage on."""
    stages_per_rank: int | None = None
    """None: what the schedule needs, 1 or 2. "interleaved-1f1b" takes more, for a smaller bubble."""

    def __post_init__(self) -> None:
        for field, least in (("stages", 1), ("microbatches", 1), ("stages_per_rank", 1)):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(
                    f"PipelineParallel({field}={value!r}).",
                    f"It is a whole number of at least {least}.",
                    f"Leave {field} out for the usual one.",
                )
        if isinstance(self.split, str) and self.split != BALANCED:
            raise ConfigError(
                f"PipelineParallel(split={self.split!r}).",
                'It is "balanced", or the names of the modules that begin the second stage and those after.',
                f'Use split=("{self.split}",) if that module begins the second stage.',
            )
        if not isinstance(self.split, str):
            object.__setattr__(self, "split", tuple(self.split))
        if isinstance(self.schedule, str):
            self._chunks()

    def plan(self, subject: Subject, world_size: int, options: PlanOptions) -> Plan:
        """Stages, schedule and buckets. Needs a sample, no ranks; raises ConfigError for what cannot be."""
        ranks = self.stages or world_size
        if ranks != world_size:
            raise ConfigError(
                f"PipelineParallel({ranks}) on {world_size} ranks.",
                "Every rank of the world has its part of the pipeline.",
                f"Launch {ranks} ranks, or use HybridParallel(pipeline={ranks}, data=...) for a multiple.",
            )
        return plan_mesh(
            self.name,
            subject,
            options,
            data=DataParallel(),
            data_size=1,
            pipeline=self,
            pipeline_size=ranks,
        )

    def resolve(
        self, subject: Subject, ranks: int, options: PlanOptions
    ) -> tuple[dict[str, int], tuple[str, ...], str, int]:
        """The stage of each unit, the modules that others read into, the schedule and the microbatches."""
        chunks = self._chunks()
        microbatches = self._microbatches(ranks)
        self._check_schedule(ranks, chunks, microbatches * options.accumulate)
        if subject.sample is None:
            raise SampleNeededError(
                f"{type(self).__name__} without a sample.",
                "The model's forward is watched once, on no data, to see which blocks run in which order.",
                "Give sample=batch to mls.plan or mls.wrap, a batch as runner.step is given.",
            )
        units = find_units(subject.model, subject.sample, subject.call)
        if isinstance(self.split, str):
            costs = _costs(subject.trace, units)
            blocks = units.blocks or units.names  # nothing repeats: cut anywhere
            stages = split.balanced(units.names, blocks, costs, ranks * chunks)
        else:
            stages = split.given(units.names, self.split)
            if len(self.split) != ranks * chunks - 1:
                raise ConfigError(
                    f"PipelineParallel(split={list(self.split)}), which makes {len(self.split) + 1} stages.",
                    f"{ranks} ranks with {chunks} stages each have {ranks * chunks}.",
                    f"Name {ranks * chunks - 1} modules, those that begin the second stage and on.",
                )
        schedule = self.schedule if isinstance(self.schedule, str) else self.schedule.to_csv()
        return stages, units.escapes, schedule, microbatches

    def _chunks(self) -> int:
        """Stages of each rank."""
        if isinstance(self.schedule, Schedule):
            return self.schedule.num_stages // self.schedule.num_ranks
        least = 2 // schedules.build(self.schedule, stages=2, microbatches=2).num_ranks
        if self.stages_per_rank is None:
            return least
        try:
            schedules.build(self.schedule, stages=2 * self.stages_per_rank, microbatches=4, ranks=2)
        except ScheduleError:
            raise ConfigError(
                f"PipelineParallel(schedule={self.schedule!r}, stages_per_rank={self.stages_per_rank}).",
                f"This schedule has {least} on each rank.",
                'Leave stages_per_rank out, or use schedule="interleaved-1f1b".',
            ) from None
        return self.stages_per_rank

    def _microbatches(self, ranks: int) -> int:
        if self.microbatches is not None:
            return self.microbatches
        return (
            MICROBATCHES_A_RANK * ranks if isinstance(self.schedule, str) else self.schedule.num_microbatches
        )

    def _check_schedule(self, ranks: int, chunks: int, microbatches: int) -> None:
        if isinstance(self.schedule, str):
            build_planned(self.schedule, ranks * chunks, ranks, microbatches)
        elif self.schedule.num_ranks != ranks or self.schedule.num_microbatches < microbatches:
            raise ConfigError(
                f"A schedule of {self.schedule.num_ranks} ranks and {self.schedule.num_microbatches} "
                f"microbatches for {ranks} ranks and {microbatches} microbatches.",
                "A given schedule is for one number of ranks, and at most its number of microbatches.",
                "Search or build one for these numbers, or give a schedule by its name.",
            )

    build = staticmethod(build_mesh)
    """Converts the model in place; parameters of other stages go to the meta device."""


def _costs(trace: Trace, units: Units) -> Mapping[str, float]:
    """FLOPs of each unit's forward; equal for all blocks where nothing is known of any."""
    costs = {name: float(sum(call.forward_flops for call in trace.calls_of(name))) for name in units.names}
    return costs if any(costs.values()) else dict.fromkeys(units.blocks, 1.0)
