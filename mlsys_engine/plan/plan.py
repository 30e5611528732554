"""The whole resolved layout of one model on one world, as one value.

The planner costs Plans, `verify` proves them, `apply` runs them: all read the same value. A field that a
strategy does not use holds its neutral value. Whatever changes the order of a summation belongs here, because
two runs with equal Plans, data and machines must give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import encode
from mlsys_engine.plan.values import Bucket, MeshAxis

SCHEMA_VERSION = 1
SHARD_LEVELS = ("none", "optimizer", "gradients", "parameters")
SYNC_MODES = ("step", "async", "local")
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-pure", "fp16-pure")
NUMERICS_MODES = ("fast", "reproducible", "world_invariant")
Pairs = tuple[tuple[str, str], ...]  # a mapping that can be hashed; keys are unique


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Immutable, printable, hashable; `to_json` and `from_json` carry it to files and other processes."""

    strategy: str  # the name in the table of strategies whose `build` runs this plan
    mesh: tuple[MeshAxis, ...]
    buckets: tuple[Bucket, ...]  # of trainable parameters, in the order in which they are reduced
    order_source: str  # where the order of the buckets comes from (Trace.order_source)
    schema_version: int = SCHEMA_VERSION
    tensor_parallel: Pairs = ()  # module FQN -> style
    stages: tuple[tuple[str, int], ...] = ()  # module FQN -> pipeline stage
    schedule: str | None = None  # pipeline schedule
    microbatch: int | None = None  # samples of a pipeline microbatch; None: whatever the caller feeds
    shard: str = "none"
    partition: tuple[tuple[int, ...], ...] = ()  # for each bucket, in elements, where each rank's part begins
    sync: str = "step"
    compression: str | None = None
    algorithms: Pairs = ()  # choice -> algorithm, for every choice that changes the order of a sum
    activation: Pairs = ()  # block FQN -> action
    precision: str = "fp32"
    accumulate: int = 1  # microbatches of one step on each rank
    numerics: str = "fast"
    compile: bool = False
    seed: int | None = None  # None: the random state of the process is left alone

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            _refuse("schema_version", self.schema_version, f"is {SCHEMA_VERSION} in this version")
        for field, allowed in (
            ("shard", SHARD_LEVELS),
            ("sync", SYNC_MODES),
            ("precision", PRECISIONS),
            ("numerics", NUMERICS_MODES),
        ):
            if getattr(self, field) not in allowed:
                _refuse(field, getattr(self, field), f"is one of {', '.join(allowed)}")
        for field in ("accumulate", "microbatch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                _refuse(field, value, "is a number of at least 1")
        _check_unique("mesh", [axis.name for axis in self.mesh])
        _check_unique("buckets", [slot.name for bucket in self.buckets for slot in bucket.slots])
        for field in ("tensor_parallel", "stages", "algorithms", "activation"):
            _check_unique(field, [key for key, _ in getattr(self, field)])

    @property
    def world_size(self) -> int:
        """Ranks that the plan is for."""
        return math.prod(axis.size for axis in self.mesh)

    def axis(self, name: str) -> int:
        """The size of the named mesh axis; 1 for an axis that the plan does not have."""
        return next((axis.size for axis in self.mesh if axis.name == name), 1)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradient that one step reduces."""
        return sum(bucket.num_bytes for bucket in self.buckets)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits, the same in every process for equal plans; goes into run records."""
        return encode.digest(self)

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON; `from_json` gives back an equal value."""
        return encode.to_json(self, indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises ConfigError for another schema version or a damaged text."""
        return encode.from_json(cls, text)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(plan: Plan) -> list[str]:
    axes = " x ".join(f"{axis.name} {axis.size}" for axis in plan.mesh)
    ranks = f"{plan.world_size} rank" + ("s" if plan.world_size != 1 else "")
    num_parameters = sum(len(bucket.slots) for bucket in plan.buckets)
    lines = [
        f"Plan {plan.hash}: {plan.strategy}, {axes} = {ranks}",
        f"  {plan.precision}, accumulate {plan.accumulate}, numerics {plan.numerics}, shard {plan.shard}, "
        f"sync {plan.sync}" + (f", compression {plan.compression}" if plan.compression else "")
        + (", compiled" if plan.compile else "") + (f", seed {plan.seed}" if plan.seed is not None else ""),
        f"  {num_parameters} trainable parameters, {_size(plan.gradient_bytes)} of gradients in "
        f"{len(plan.buckets)} bucket{'s' if len(plan.buckets) != 1 else ''}"
        + (f": {_summary([_size(bucket.num_bytes) for bucket in plan.buckets])}" if plan.buckets else ""),
        f"  order of buckets: {plan.order_source}",
    ]  # fmt: skip
    for title, pairs in (
        ("algorithms", plan.algorithms),
        ("tensor parallel", plan.tensor_parallel),
        ("stages", plan.stages),
        ("activation", plan.activation),
    ):
        if pairs:
            lines.append(f"  {title}: {_summary([f'{key}={value}' for key, value in pairs])}")
    if plan.schedule:
        name = "of its own" if "\n" in plan.schedule else plan.schedule
        lines.append(f"  schedule {name}, {dict(plan.algorithms).get('microbatches')} microbatches a batch")
    return lines


def _summary(items: Sequence[str], shown: int = 4) -> str:
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def _check_unique(field: str, names: Sequence[str]) -> None:
    if repeated := sorted(
        {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    ):
        _refuse(field, f"{repeated[0]!r} twice", "names everything once")


def _refuse(field: str, given: object, expected: str) -> None:
    raise ConfigError(
        f"A plan with {field}: {given}.", f"{field} {expected}.", "Make the plan with mls.plan."
    )
