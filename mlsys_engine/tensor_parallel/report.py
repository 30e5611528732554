"""What a tensor-parallel plan cuts, what it leaves whole and why, as a value that prints as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import Loss, call_model
from mlsys_engine.tensor_parallel.given import plan_of_model, styles_of_plan
from mlsys_engine.tensor_parallel.infer import check_heads, infer
from mlsys_engine.tensor_parallel.sharding import Sharding
from mlsys_engine.tensor_parallel.styles import shardings


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    use: str  # "projection", "embedding", "position" or "" for what no matrix product or look-up reads
    sharding: Sharding | None  # None: whole on every rank
    reason: str  # why it is whole, or why a row slices a whole input


@dataclass(frozen=True, kw_only=True)
class Report:
    """A tensor-parallel plan of a model. `print(report)` shows it with equal blocks in one line."""

    size: int
    styles: tuple[tuple[str, str], ...]  # module or parameter FQN -> style text
    rows: tuple[Row, ...]  # of every parameter, in the model's order

    @property
    def share(self) -> float:
        """The share of the elements of projections, embeddings and experts that is cut, tables of positions
        aside; 1.0 for a model without any."""
        counted = [row for row in self.rows if row.use in ("projection", "embedding")]
        total = sum(math.prod(row.shape) for row in counted)
        cut = sum(math.prod(row.shape) for row in counted if row.sharding is not None)
        return cut / total if total else 1.0

    @property
    def rank_share(self) -> float:
        """The share of all of the model's elements that the fullest rank (the first) holds."""
        total = sum(math.prod(row.shape) for row in self.rows)
        held = sum(
            math.prod(row.sharding.local_shape(row.shape, 0) if row.sharding else row.shape)
            for row in self.rows
        )
        return held / total if total else 1.0

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            shown = re.sub(r"\.\d+(?=\.)", ".*", row.name)
            reason = re.sub(r"\.\d+(?=\.|$|:)", ".*", row.reason)
            groups.setdefault((shown, "x".join(map(str, row.shape)), _cut(row), reason), []).append(row)
        cells = [["parameter", "count", "shape", "on a rank", "why"]]
        cells += [[key[0], str(len(rows)), *key[1:]] for key, rows in groups.items()]
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = [
            f"{self.size} ranks cut {self.share:.1%} of the elements of projections, embeddings and experts; "
            f"a rank holds {self.rank_share:.1%} of the model.",
            *(
                "  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)).rstrip()
                for line in cells
            ),
        ]
        return "\n".join(lines)


def report(
    model: nn.Module,
    sample: Any,
    size: int,
    plan: str | Mapping[str, str] = "auto",
    *,
    loss: Loss | None = None,
    expert_parallel: bool = False,
) -> Report:
    """How `size` ranks would share the weights of `model`. Needs no ranks and leaves the model as it was.

    `sample` is one microbatch. `plan` is "auto", "model" (what a Hugging Face model brings along), or a
    mapping of patterns of module names to styles. `loss(output, batch)` takes part in an automatic plan,
    which gives every rank whole experts with `expert_parallel`.
    Raises ConfigError for a size that does not divide heads and for a plan that does not fit the model.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"size={size!r}.", "It is a number of ranks, at least 1.", "Use 2, for example.")
    if isinstance(plan, str) and plan not in ("auto", "model"):
        raise ConfigError(
            f"plan={plan!r}.",
            'A plan is "auto", "model", or a mapping of patterns of module names to styles.',
            'Use plan="auto".',
        )

    def call(model: nn.Module, batch: Any) -> Any:
        output = call_model(model, batch, with_loss=loss is not None)
        return output if loss is None else loss(output, batch)

    if isinstance(plan, str):
        check_heads(model, size)
    inferred = infer(model, sample, size, call, by_experts=expert_parallel)
    styles, why = inferred.styles, inferred.reasons | inferred.sliced
    if plan != "auto":
        given = plan_of_model(model) if isinstance(plan, str) else plan
        styles, why = styles_of_plan(model, given), {}
    found = shardings(model, styles, size)
    rows = tuple(
        Row(
            name=name,
            shape=tuple(parameter.shape),
            use=inferred.uses.get(name, ""),
            sharding=found.get(name),
            reason=why.get(name, "" if name in found else _why_whole(inferred.uses.get(name), plan)),
        )
        for name, parameter in model.named_parameters()
    )
    return Report(size=size, styles=styles, rows=rows)


def _cut(row: Row) -> str:
    return "whole" if row.sharding is None else "x".join(map(str, row.sharding.local_shape(row.shape, 0)))


def _why_whole(use: str | None, plan: object) -> str:
    if plan != "auto" and use:
        return "not in the plan"
    return "" if use else "no matrix product or look-up reads it"
