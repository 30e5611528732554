"""What `verify` answers: a frozen value that prints itself, and is true where the plan is right."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one value of the plan's run is from the unsharded run's."""

    kind: str
    """"output", "gradient", "parameter" or "buffer" (after the step), or "total" (as StepResult has it)."""
    name: str
    """FQN of the parameter, of the buffer, or of the module whose output it is; or "loss", "grad_norm"."""
    relative: float
    """Largest absolute difference over the scale of the unsharded value; inf where one is not finite."""
    absolute: float
    """Largest absolute difference."""
    rank: int
    """The rank on which the difference is largest."""
    where: str = ""
    """Where the plan has it: bucket, stage, style."""
    cause: str = ""
    """What is known about why, of the culprit only; empty where the numbers do not tell."""

    @property
    def title(self) -> str:
        """What differs, in words."""
        name = self.name or "the model"
        return f"the {name}" if self.kind == "total" else f"the {self.kind} of {name}"

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.title}{place}: {self.relative:.2g} relative on rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of one comparison; `bool(verdict)` is `verdict.ok`."""

    ok: bool
    """Whether every value of the plan's step is within the tolerance of the unsharded model's."""
    culprit: Difference | None
    """The first value above the tolerance, in the order in which a step computes them; None where ok."""
    tolerance: float
    """Relative difference up to which values are called equal."""
    tolerance_reason: str
    """Where the tolerance comes from."""
    dtype: str
    """Precision in which both runs were made."""
    plan_hash: str
    strategy: str
    world_size: int
    loss: float
    """Mean loss of the unsharded run."""
    plan_loss: float
    """Mean loss that the plan's run told, on the rank where it is furthest off."""
    compared: dict[str, int]
    """How many values of each kind were compared."""
    num_different: int
    """How many of them are above the tolerance."""
    largest: float
    """The largest relative difference of all."""
    worst: tuple[Difference, ...]
    """The largest differences, at most ten, the largest first; where not ok, of those above the tolerance."""
    notes: tuple[str, ...] = ()
    """What the comparison left out or changed."""

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self, indent: int | None = None) -> str:
        """The verdict as JSON; numbers that are not finite are written as text."""
        return json.dumps(_finite(dataclasses.asdict(self)), indent=indent)

    @property
    def line(self) -> str:
        """The verdict in one line."""
        ranks = f"{self.world_size} rank{'s' if self.world_size != 1 else ''}"
        plan = f"plan {self.plan_hash} ({self.strategy}, {ranks})"
        if self.culprit is None:
            return (
                f"EQUAL: {plan} takes the step of the unsharded model; largest relative difference "
                f"{self.largest:.1e}, tolerance {self.tolerance:.1e} in {self.dtype}."
            )
        cause = f"; {self.culprit.cause}" if self.culprit.cause else ""
        return (
            f"DIFFERENT: {plan} parts from the unsharded model at {self.culprit}, tolerance "
            f"{self.tolerance:.1e} in {self.dtype}{cause}."
        )

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}s" for kind, count in self.compared.items() if count)
        lines = [
            self.line,
            f"  loss       {self.loss:.12g} in one process, {self.plan_loss:.12g} under the plan",
            f"  compared   {counts}" + (f"; {self.num_different} differ" if self.num_different else ""),
            f"  tolerance  {self.tolerance:.1e}: {self.tolerance_reason}",
        ]
        if not self.ok:
            lines += ["", *_table(self.worst), ""]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _table(differences: tuple[Difference, ...]) -> list[str]:
    """The largest differences, in aligned columns."""
    head = ("kind", "name", "relative", "absolute", "rank", "where")
    rows = [
        (
            item.kind,
            item.name or "(model)",
            f"{item.relative:.2e}",
            f"{item.absolute:.2e}",
            str(item.rank),
            item.where,
        )
        for item in differences
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
