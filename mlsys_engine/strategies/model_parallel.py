"""Tensor parallelism: the weights of each layer are cut over ranks, which compute it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import Plan
from mlsys_engine.strategies.base import PlanOptions, SampleNeededError, Subject
from mlsys_engine.strategies.cut_share import SEQUENCE_PARALLEL
from mlsys_engine.strategies.data_parallel import DataParallel
from mlsys_engine.strategies.mesh import build_mesh, plan_mesh
from mlsys_engine.tensor_parallel import check_heads, infer, plan_of_model, shardings, styles_of_plan

AUTO, OF_MODEL = "auto", "model"


@dataclass(frozen=True, init=False)
class ModelParallel:
    """Every rank holds a part of each large weight, and all compute every layer of each microbatch together.

    An unchanged model runs its own forward. Values stay cut from one weight to the next where each rank can
    go on with its part, and are summed or gathered where it cannot. All ranks are fed the same batches.
    """

    name: ClassVar[str] = "model_parallel"

    size: int | None
    """Ranks that the weights are cut over; None: all of the world."""
    cuts: str | tuple[tuple[str, str], ...]
    """What was given as plan=."""
    sequence_parallel: bool
    """Norms, dropout and residual sums are cut along the tokens, and so are the activations kept of them."""
    expert_parallel: bool
    """Every rank has whole experts of each mixture, and computes their tokens, in place of a part of each."""

    def __init__(
        self,
        size: int | None = None,
        plan: str | Mapping[str, str] = AUTO,
        *,
        sequence_parallel: bool = False,
        expert_parallel: bool = False,
    ) -> None:
        """`plan` is "auto", "model" (the tp_plan that a Hugging Face model brings along), or a mapping of
        patterns of module names to styles: {"layers.*.up": "column", "layers.*.down": "row"}."""
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(
                f"ModelParallel(size={size!r}).",
                "It is a whole number of ranks of at least 1.",
                "Leave size out for all ranks of the world.",
            )
        if not (isinstance(plan, Mapping) or plan in (AUTO, OF_MODEL)):
            raise ConfigError(
                f"ModelParallel(plan={plan!r}).",
                'A plan is "auto", "model", or a mapping of patterns of module names to styles.',
                'Use plan="auto".',
            )
        if not isinstance(sequence_parallel, bool):
            raise ConfigError(
                f"ModelParallel(sequence_parallel={sequence_parallel!r}).",
                "Values between products are cut along their tokens, or are whole.",
                "Use True or False.",
            )
        if not isinstance(expert_parallel, bool) or (expert_parallel and plan != AUTO):
            raise ConfigError(
                f"ModelParallel(plan={plan!r}, expert_parallel={expert_parallel!r}).",
                "The automatic plan gives every rank whole experts, or a part of each; another plan says "
                'itself which ("dim0" for a stack of experts).',
                'Use True or False with plan="auto".',
            )
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "expert_parallel", expert_parallel)
        object.__setattr__(self, "sequence_parallel", sequence_parallel)
        object.__setattr__(self, "cuts", plan if isinstance(plan, str) else tuple(plan.items()))

    def plan(self, subject: Subject, world_size: int, options: PlanOptions) -> Plan:
        """Styles and buckets. Needs no ranks, and a sample for an automatic plan; raises ConfigError for what
        cannot be."""
        size = self.size or world_size
        if size != world_size:
            raise ConfigError(
                f"ModelParallel({size}) on {world_size} ranks.",
                "Every rank of the world has its part of the weights.",
                f"Launch {size} ranks, or use HybridParallel(model={size}, data=...) for a multiple.",
            )
        return plan_mesh(
            self.name,
            subject,
            options,
            data=DataParallel(),
            data_size=1,
            model=self,
            model_size=size,
        )

    def choices(self) -> tuple[tuple[str, str], ...]:
        """For Plan.algorithms."""
        return ((SEQUENCE_PARALLEL, "on"),) if self.sequence_parallel else ()

    def resolve(self, subject: Subject, size: int) -> tuple[tuple[str, str], ...]:
        """The styles of modules and parameters, checked against the model."""
        if isinstance(self.cuts, str):
            check_heads(subject.model, size)
        if self.cuts != AUTO:
            given = plan_of_model(subject.model) if isinstance(self.cuts, str) else dict(self.cuts)
            styles = styles_of_plan(subject.model, given)
        elif subject.sample is None:
            raise SampleNeededError(
                f"{type(self).__name__} without a sample.",
                "The model's forward is followed once, on no data, to see which weights can be cut.",
                "Give sample=batch to mls.plan or mls.wrap, a batch as runner.step is given.",
            )
        else:
            styles = self._inferred(subject, size)
        if not shardings(subject.model, styles, size):
            raise ConfigError(
                f"ModelParallel({size}) for a {type(subject.model).__name__}.",
                "It cuts the weights of projections, embeddings and experts; no weight of this model can be "
                "cut.",
                "Use DataParallel() or PipelineParallel(), or name what to cut: plan={...}.",
            )
        return styles

    def _inferred(self, subject: Subject, size: int) -> tuple[tuple[str, str], ...]:
        found = infer(
            subject.model, subject.sample, size, _with_loss(subject), by_experts=self.expert_parallel
        )
        if self.expert_parallel and not found.experts:
            raise ConfigError(
                f"ModelParallel({size}, expert_parallel=True) for a {type(subject.model).__name__}.",
                f"It gives each rank whole experts of a stack of at least {size}, whose rows one grouped "
                "product (torch.nn.functional.grouped_mm) multiplies; this model has no such stack.",
                "Leave expert_parallel out, which cuts every expert by its width, or build the model with "
                'experts_implementation="grouped_mm".',
            )
        return found.styles

    build = staticmethod(build_mesh)
    """Converts the model in place; its parameters become this rank's parts."""


def _with_loss(subject: Subject) -> Callable[[nn.Module, Any], Any]:
    def call(model: nn.Module, sample: Any) -> Any:
        output = subject.call(model, sample)
        return output if subject.loss is None else subject.loss(output, sample)

    return call
