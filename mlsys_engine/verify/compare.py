"""From what all ranks found to a verdict that names the culprit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlsys_engine.plan import Plan
from mlsys_engine.verify.causes import Evidence, likely_cause
from mlsys_engine.verify.gaps import Gap
from mlsys_engine.verify.observe import Key, Numbers, called
from mlsys_engine.verify.planned import RankReport
from mlsys_engine.verify.serial import SerialStep
from mlsys_engine.verify.verdict import Difference, Verdict

_NUM_WORST = 10
_OF_FORWARD = ("num_tokens", "loss")


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Up to which relative difference values are equal, and why."""

    value: float
    reason: str
    dtype: str


def compare(
    plan: Plan,
    reference: SerialStep,
    ranks: Sequence[RankReport],
    tolerance: Tolerance,
    notes: Sequence[str],
) -> Verdict:
    """The verdict on what all ranks found.

    The culprit is the first value that differs in the order in which a step computes them: outputs of modules
    as the forward goes, count and loss, gradients as the backward goes, their norm, then parameters and
    buffers.
    """
    suspects = _in_order(plan, reference, ranks)
    wrong = [item for item in suspects if not item.relative <= tolerance.value]
    worst = sorted(wrong or suspects, key=lambda item: item.relative, reverse=True)[:_NUM_WORST]
    culprit = wrong[0] if wrong else None
    if culprit is not None:
        evidence = Evidence(
            plan=plan, reference=reference, ranks=ranks, wrong=wrong, tolerance=tolerance.value
        )
        culprit = replace(culprit, cause=likely_cause(culprit, evidence))
    apart = max(ranks, key=lambda rank: _scalar_gap(rank.loss, reference.loss).relative)
    return Verdict(
        ok=culprit is None,
        culprit=culprit,
        tolerance=tolerance.value,
        tolerance_reason=tolerance.reason,
        dtype=tolerance.dtype,
        plan_hash=plan.hash,
        strategy=plan.strategy,
        world_size=plan.world_size,
        loss=reference.loss,
        plan_loss=apart.loss,
        compared=dict(Counter(item.kind for item in suspects)),
        num_different=len(wrong),
        largest=worst[0].relative,
        worst=tuple(worst),
        notes=(*notes, *_notes(reference, ranks)),
    )


def _in_order(plan: Plan, reference: SerialStep, ranks: Sequence[RankReport]) -> list[Difference]:
    """Everything that was compared, in the order of a step."""
    position = {name: index for index, name in enumerate(reference.order)}
    index = {name: number for number, name in enumerate(reference.parameters)}

    def executed(item: Difference) -> tuple[int, int]:
        return when(item.name, position), index.get(item.name, len(index))

    outputs = _largest(plan, "output", [output_gaps(rank.outputs, reference.outputs) for rank in ranks])
    gradients = _largest(plan, "gradient", [_with_absent(rank) for rank in ranks])
    parameters = _largest(plan, "parameter", [rank.parameters for rank in ranks])
    totals = _largest(plan, "total", [_total_gaps(rank, reference) for rank in ranks])
    return [
        *sorted(outputs, key=lambda item: position[item.name]),
        *(total for total in totals if total.name in _OF_FORWARD),
        *sorted(gradients, key=executed, reverse=True),
        *(total for total in totals if total.name not in _OF_FORWARD),
        *sorted(parameters, key=executed),
        *_largest(plan, "buffer", [rank.buffers for rank in ranks]),
    ]


def _largest(plan: Plan, kind: str, ranks: Sequence[Mapping[str, Gap]]) -> list[Difference]:
    best: dict[str, tuple[Gap, int]] = {}
    for rank, gaps in enumerate(ranks):
        for name, gap in gaps.items():
            if name not in best or gap.relative > best[name][0].relative:
                best[name] = (gap, rank)
    return [
        Difference(
            kind=kind,
            name=name,
            relative=gap.relative,
            absolute=gap.absolute,
            rank=rank,
            where="" if kind == "total" else _where(plan, name),
        )
        for name, (gap, rank) in best.items()
    ]


Outputs = Mapping[Key, Sequence[Numbers]]


def output_gaps(own: Outputs, true: Outputs) -> dict[str, Gap]:
    """For each call of a module the largest gap of its outputs that both runs have written down.

    Each output is held against the nearest of its microbatches: with several stages on a rank, what every
    stage computes for itself comes in another order than in one process.
    """
    gaps: dict[str, Gap] = {}
    for key, numbers in own.items():
        for one in numbers if key in true else ():
            gap = min((_numbers_gap(one, other) for other in true[key]), key=lambda gap: gap.relative)
            name = called(key[1], key[2])
            if name not in gaps or gap.relative > gaps[name].relative:
                gaps[name] = gap
    return gaps


def _numbers_gap(own: Numbers, true: Numbers) -> Gap:
    (norm, projection), (true_norm, true_projection) = own, true
    apart = max(abs(norm - true_norm), abs(projection - true_projection))
    return Gap.of(apart, true_norm, norm / true_norm if true_norm else None)


def _with_absent(rank: RankReport) -> dict[str, Gap]:
    missing = Gap(relative=1.0, absolute=math.nan, factor=0.0)
    return rank.gradients | dict.fromkeys(rank.absent, missing)


def _total_gaps(rank: RankReport, reference: SerialStep) -> dict[str, Gap]:
    totals = {
        "num_tokens": _scalar_gap(rank.count, reference.count),
        "loss": _scalar_gap(rank.loss, reference.loss),
        "grad_norm": _scalar_gap(rank.grad_norm, reference.grad_norm),
    }
    if rank.skipped != reference.skipped:
        totals["skipped"] = Gap(relative=math.inf, absolute=1.0)
    return totals


def _scalar_gap(own: float, true: float) -> Gap:
    return Gap.of(abs(own - true), max(abs(true), 1e-3), own / true if true else None)


def when(parameter: str, position: Mapping[str, int]) -> int:
    """When the module that holds a parameter has run: itself, or the nearest that was seen around it."""
    name = parameter
    while name:
        name = name.rpartition(".")[0]
        if name in position:
            return position[name]
    return len(position)


def _where(plan: Plan, name: str) -> str:
    """Where the plan has a parameter or module, in words."""
    words = [
        f"bucket {number}"
        for number, bucket in enumerate(plan.buckets)
        if any(slot.name == name for slot in bucket.slots)
    ]
    for title, pairs in (("stage", plan.stages), ("style", plan.tensor_parallel)):
        around = [
            (len(key), value) for key, value in pairs if name == key or name.startswith(f"{key}.") or not key
        ]
        if around:
            words.append(f"{title} {max(around)[1]}")
    return ", ".join(words)


def _notes(reference: SerialStep, ranks: Sequence[RankReport]) -> list[str]:
    notes = []
    if not any(rank.sees_gradients for rank in ranks):
        notes.append(
            "no rank keeps reduced gradients under a sharded optimizer: the updates were compared instead"
        )
    unused = [name for name in reference.trainable if name not in reference.gradients]
    if unused:
        notes.append(
            f"{len(unused)} trainable parameters got no gradient in one process ({unused[0]}"
            + (", ...)" if len(unused) > 1 else ")")
        )
    if reference.skipped:
        notes.append("the step was skipped: its gradients are not finite")
    return notes
