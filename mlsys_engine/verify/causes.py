"""What the numbers tell about why a value differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlsys_engine.plan import Plan
from mlsys_engine.verify.gaps import Gap
from mlsys_engine.verify.planned import RankReport
from mlsys_engine.verify.serial import SerialStep
from mlsys_engine.verify.verdict import Difference

# Two factors are the same up to this: the gap has already said that they are factors at all.
_SAME_FACTOR = 1e-2
_STYLES = {
    "column": "a column-parallel weight gives each rank some of the outputs: look at which rows are on which "
    "rank (segments of a fused weight), and at who reads the output",
    "row": "a row-parallel weight gives each rank a part of every sum: the parts have to be added over the "
    "ranks, once, and the bias once",
    "vocabulary": "each rank has some of the vocabulary: ids count from where its part begins, and rows that "
    "others hold are zeros before the sum over the ranks",
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known when the culprit is named."""

    plan: Plan
    reference: SerialStep
    ranks: Sequence[RankReport]
    wrong: Sequence[Difference]
    tolerance: float


def likely_cause(culprit: Difference, evidence: Evidence) -> str:
    """In words, without a full stop; empty where nothing is told."""
    of_kind: dict[str, Callable[[Difference, Evidence], str]] = {
        "output": _of_output,
        "gradient": _of_gradient,
        "parameter": _of_parameter,
        "total": _of_total,
    }
    explain = of_kind.get(culprit.kind)
    return "" if explain is None else explain(culprit, evidence)


def _of_output(culprit: Difference, evidence: Evidence) -> str:
    style = culprit.where.rpartition("style ")[2].partition(":")[0]
    if style in _STYLES:
        return _STYLES[style]
    if evidence.plan.axis("model") > 1:
        return (
            "it is not sharded itself: look at what it reads, and whether its weights are equal on all ranks"
        )
    stage = _stage(culprit)
    if stage:
        return f"all that was compared of stage {stage - 1} is right: look at what crosses into stage {stage}"
    return (
        "the forward itself differs, before anything is summed over ranks: look at the weights and the "
        "samples that this rank has, and at what the module reads besides them"
    )


def _of_gradient(culprit: Difference, evidence: Evidence) -> str:
    if any(culprit.name in rank.absent for rank in evidence.ranks):
        return f"no gradient reached it under the plan{_company(culprit, evidence)}"
    if culprit.name not in evidence.reference.gradients:
        return "in one process it is not used and gets no gradient"
    gaps = [rank.gradients[culprit.name] for rank in evidence.ranks if culprit.name in rank.gradients]
    if _ranks_disagree(gaps, evidence.tolerance):
        company = _company(culprit, evidence)
        return f"ranks hold different gradients: they were not summed over all ranks{company}"
    factor = gaps[0].factor
    told = [] if factor is None else [_of_factor("it", factor, evidence.plan) + _company(culprit, evidence)]
    stage = _stage(culprit)
    later = [_stage(item) for item in evidence.wrong if item.kind == "gradient"]
    if (
        stage is not None
        and stage < _last_stage(evidence.plan)
        and max(filter(None, later), default=0) <= stage
    ):
        told.append(f"gradients of stage {stage + 1} are right: look at what crosses back from there")
    return "; ".join(told)


def _of_parameter(culprit: Difference, evidence: Evidence) -> str:
    gaps = [rank.parameters[culprit.name] for rank in evidence.ranks if culprit.name in rank.parameters]
    if culprit.name not in evidence.reference.trainable:
        return "it is frozen, and was changed all the same"
    if culprit.name not in evidence.reference.gradients:
        return "it has no gradient in one process, and was changed all the same"
    if any(gap.factor is not None and abs(gap.factor) < _SAME_FACTOR for gap in gaps):
        return "its gradient is right, but it was not stepped" if _sees(evidence) else "it was not stepped"
    if _ranks_disagree(gaps, evidence.tolerance):
        return "ranks hold different values after the step"
    factor = gaps[0].factor
    return "" if factor is None else _of_factor("its update", factor, evidence.plan)


def _of_total(culprit: Difference, evidence: Evidence) -> str:
    reference, rank = evidence.reference, evidence.ranks[culprit.rank]
    if culprit.name == "skipped":
        did = "was skipped" if rank.skipped else "was taken, with gradients that are not finite,"
        return f"the step {did} under the plan"
    told, true = {
        "loss": (rank.loss, reference.loss),
        "num_tokens": (rank.count, reference.count),
        "grad_norm": (rank.grad_norm, reference.grad_norm),
    }[culprit.name]
    if culprit.name == "num_tokens":
        return f"the plan counted {told:g} and one process {true:g}: samples were lost, or counted twice"
    if not true:
        return ""
    return _of_factor("it", told / true, evidence.plan)


def _of_factor(what: str, factor: float, plan: Plan) -> str:
    if abs(factor) < _SAME_FACTOR:
        return f"{what} is zero: nothing was added into it"
    for axis in plan.mesh:
        ranks = f"the {axis.size} {axis.name} ranks"
        if axis.size > 1 and abs(factor * axis.size - 1) < _SAME_FACTOR:
            return (
                f"{what} is 1/{axis.size} of what it should be: divided by {ranks} once too often, or not "
                "summed over them"
            )
        if axis.size > 1 and abs(factor / axis.size - 1) < _SAME_FACTOR:
            return (
                f"{what} is {axis.size} times what it should be: summed over {ranks} once too often, or not "
                "divided by them"
            )
    parts = plan.accumulate
    if parts > 1 and abs(factor * parts - 1) < _SAME_FACTOR:
        return f"{what} is 1/{parts} of what it should be: one of {parts} microbatches, or their mean"
    return f"{what} is {factor:.3g} times what it should be"


def _stage(item: Difference) -> int | None:
    digits = item.where.partition("stage ")[2].partition(",")[0]
    return int(digits) if digits.isdigit() else None


def _last_stage(plan: Plan) -> int:
    return max((stage for _, stage in plan.stages), default=0)


def _company(culprit: Difference, evidence: Evidence) -> str:
    """Whether exactly the parameters of its bucket are wrong."""
    wrong = {item.name for item in evidence.wrong if item.kind == "gradient"}
    for number, bucket in enumerate(evidence.plan.buckets):
        names = {slot.name for slot in bucket.slots}
        if culprit.name in names and len(evidence.plan.buckets) > 1 and wrong == names:
            return f"; bucket {number} differs, all of it and nothing else"
    return ""


def _ranks_disagree(gaps: Sequence[Gap], tolerance: float) -> bool:
    marks = [gap.mark for gap in gaps]
    return max(marks, default=0.0) - min(marks, default=0.0) > tolerance


def _sees(evidence: Evidence) -> bool:
    return any(rank.sees_gradients for rank in evidence.ranks)
