"""The stages of a pipeline, one after the other in one process, against the model that is not divided."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mlsys_engine.pipeline.partial import (
    Crossings,
    PartResult,
    StagePart,
    Units,
    find_units,
    parameter_stages,
    signature_of,
)
from mlsys_engine.pipeline.split import balanced


def loss_of(output: Any) -> torch.Tensor:
    loss = output["loss"] if isinstance(output, dict) else getattr(output, "loss", output)
    assert isinstance(loss, torch.Tensor)
    return loss


@dataclass
class Divided:
    """A model's stages, each over its own copy of the model, as on different ranks."""

    model: nn.Module
    units: Units
    num_stages: int
    stages: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def evenly(cls, model: nn.Module, sample: Any, num_stages: int) -> Divided:
        units = find_units(model, sample)
        costs = dict.fromkeys(units.blocks, 1.0)
        return cls(model, units, num_stages, balanced(units.names, units.blocks, costs, num_stages))

    def __post_init__(self) -> None:
        self.copies = [copy.deepcopy(self.model) for _ in range(self.num_stages)]
        self.parts = [
            StagePart(each, stage, self.stages, self.num_stages, self.units.escapes)
            for stage, each in enumerate(self.copies)
        ]

    def forward(self, call: Callable[[nn.Module], Any], signature: Any = None) -> list[PartResult[Any]]:
        results: list[PartResult[Any]] = []
        for part, model in zip(self.parts, self.copies, strict=True):
            inbox = list(results[-1].sent) if results else []

            def receive(skeleton: torch.Tensor, inbox: list[torch.Tensor] = inbox) -> torch.Tensor:
                value = inbox.pop(0)
                assert (value.shape, value.dtype) == (skeleton.shape, skeleton.dtype)
                assert value.requires_grad == skeleton.requires_grad
                return value.detach().clone().requires_grad_(skeleton.requires_grad)

            state = results[-1].rng_state if results else None
            results.append(
                part.run(lambda model=model: call(model), receive, signature=signature, rng_state=state)
            )
            assert not inbox, "what was sent is received"
        return results

    def train(self, batch: Any) -> torch.Tensor:
        """Forward and backward; the loss."""
        results = self.forward(lambda model: loss_of(model(**batch)), signature_of(batch))
        loss = results[-1].output
        loss.backward()
        for earlier, later in zip(reversed(results[:-1]), reversed(results[1:]), strict=True):
            pairs = [
                (sent, leaf.grad)
                for sent, leaf in zip(earlier.sent, later.received, strict=True)
                if leaf.grad is not None
            ]
            torch.autograd.backward([sent for sent, _ in pairs], [grad for _, grad in pairs])
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Of all parameters; those of a tied one are summed from the last stage to the first."""
        named = [dict(model.named_parameters()) for model in self.copies]
        found: dict[str, torch.Tensor | None] = {}
        for name, stages in parameter_stages(self.model, self.stages).items():
            grads = [grad for stage in reversed(stages) if (grad := named[stage][name].grad) is not None]
            found[name] = sum(grads[1:], grads[0]) if grads else None
        return found

    def crossings(self, batch: Any) -> list[Crossings | None]:
        return [part.crossings(signature_of(batch)) for part in self.parts]


def check_equal(
    model: nn.Module, batches: Sequence[Any], num_stages: int, inexact: Sequence[str] = ()
) -> Divided:
    """Loss, gradients and buffers are those of the whole model, to the bit, for each batch on its own.

    `inexact` names tied weights that two stages share in another order than one process: their gradients are
    sums of the same float64 numbers in another order.
    """
    divided = Divided.evenly(model, batches[0], num_stages)
    whole = copy.deepcopy(model)
    for batch in batches:
        for each in (whole, *divided.copies):
            each.zero_grad()
        torch.manual_seed(7)
        expected = loss_of(whole(**batch))
        expected.backward()
        torch.manual_seed(7)
        assert torch.equal(divided.train(batch), expected.detach())
        found = divided.gradients()
        for name, parameter in whole.named_parameters():
            got, wanted = found[name], parameter.grad
            assert (got is None) == (wanted is None), name
            if got is None or wanted is None:
                continue
            if name in inexact:
                # A few dozen terms, each rounded at 1.1e-16 of the largest partial sum.
                assert (got - wanted).norm() <= 1e-14 * wanted.norm()
            else:
                assert torch.equal(got, wanted), name
        for name, buffer in whole.named_buffers():
            owner = next((s for unit, s in divided.stages.items() if name.startswith(f"{unit}.")), None)
            for stage, each in enumerate(divided.copies):
                if owner in (None, stage):
                    assert torch.equal(each.get_buffer(name), buffer), name
    return divided
