"""A model whose forward knows where it is cut, so that the runtime is tested by itself, and its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from mlsys_engine.pipeline.runtime import PipelineAccumulation, PlannedSchedule, find_ties
from mlsys_engine.pipeline.runtime.random_state import restored, seed_microbatch

WORDS, WIDTH = 13, 16


class _LeftError(Exception):
    """A stage's part of the forward is over."""


@dataclass
class Result:
    output: Any
    sent: tuple[torch.Tensor, ...]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.dropout(functional.gelu(self.up(self.norm(x))), 0.1, self.training)
        return x + self.down(hidden)


class Cut(nn.Module):
    """An embedding, a block a stage, and a head; every later block reads what the first gives."""

    def __init__(self, stages: int, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(stages))
        if tied:
            self.head.weight = self.embed.weight
        self.part: tuple[int, Any] | None = None
        self.sent: tuple[torch.Tensor, ...] = ()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        part, receive = self.part or (None, None)
        values: tuple[torch.Tensor, ...] = ()
        for stage, block in enumerate(self.blocks):
            if part is not None and stage < part:
                continue
            if part is not None and stage > part:
                self.sent = values
                raise _LeftError
            if stage == 0:
                first = x = block(self.embed(ids))
            else:
                if part is not None:
                    skeleton = torch.empty(*ids.shape, WIDTH, device="meta", dtype=self.head.weight.dtype)
                    first = receive(skeleton)
                    x = receive(skeleton) if stage > 1 else first
                x = block(x) + 0.5 * first
            values = (first,) if stage == 0 else (first, x)
        return self.head(x)


class CutPart:
    def __init__(self, model: Cut, stage: int) -> None:
        self.model, self.stage = model, stage

    def run(self, forward, receive, *, signature):
        self.model.part, self.model.sent = (self.stage, receive), ()
        try:
            return Result(forward(), ())
        except _LeftError:
            return Result(None, self.model.sent)
        finally:
            self.model.part = None


class Gradients:
    """A reducer that reduces nothing and remembers what it was told."""

    num_buckets = 0

    def __init__(self) -> None:
        self.launched: list[int] = []

    def start(self, num_backwards: int) -> None:
        self.launched = []

    def ready(self, parameter: nn.Parameter) -> None: ...

    def launch(self, bucket: int) -> None:
        self.launched.append(bucket)

    def end_backward(self) -> None: ...


def unit_stages(stages: int) -> dict[str, int]:
    return {"embed": 0, **{f"blocks.{i}": i for i in range(stages)}, "head": stages - 1}


def forward_of(model):
    def forward(batch):
        logits = model(batch)
        labels = batch.roll(1, 0)
        loss = functional.cross_entropy(logits.reshape(-1, WORDS), labels.reshape(-1), reduction="sum")
        return loss, torch.tensor(float(batch.numel()), dtype=torch.float64)

    return forward


def pipeline(model, schedule, stages, *, pieces=4, choices=None):
    ranks = dist.get_world_size()
    planned = PlannedSchedule(schedule, stages=stages, ranks=ranks, pieces=pieces)
    own = [stage for stage, rank in enumerate(planned.placement) if rank == dist.get_rank()]
    return PipelineAccumulation(
        schedule=planned,
        model=model,
        parts={stage: CutPart(model, stage) for stage in own},
        group=dist.group.WORLD,
        device=torch.device("cpu"),
        gradients=Gradients(),
        stage_of_bucket=sorted(own, reverse=True),
        ties=find_ties(model, unit_stages(stages)),
        tied_choices=choices,
    )


def serial(model, microbatches):
    """Loss sum and gradients of one process that seeds every microbatch by itself."""
    forward, base = forward_of(model), int(torch.randint(2**62, ()))
    total = torch.zeros((), dtype=torch.float64)
    with restored(torch.device("cpu")):
        for index, microbatch in enumerate(microbatches):
            seed_microbatch(base, index)
            loss, _ = forward(microbatch)
            loss.backward()
            total += loss.detach()
    return total
