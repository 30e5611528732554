"""Runs one stage's part of a model's forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline.partial.mode import Left, StageMode
from mlsys_engine.pipeline.partial.signatures import Form
from mlsys_engine.pipeline.partial.skeletons import Shapes, Skeletons
from mlsys_engine.pipeline.partial.units import parameter_stages

T = TypeVar("T")
Receive = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """The forms of what comes in from the stage before and goes out to the next, in order."""

    received: tuple[Form, ...]
    sent: tuple[Form, ...]
    unit_calls: int  # of the stage's own units


@dataclass(frozen=True, kw_only=True)
class PartResult(Generic[T]):
    """What a run gives. `output` is the forward's result on the last stage, None before.

    `sent` are the values for the next stage with their graphs: the backward starts there. `received` are the
    leaves that came in, whose gradients go back. `rng_state` is the state of the CPU's generator and of the
    device's after the part; the next stage starts with it.
    """

    output: T | None
    sent: tuple[torch.Tensor, ...]
    received: tuple[torch.Tensor, ...]
    rng_state: tuple[torch.Tensor, ...]


class Cuts(Protocol):
    """Parameters that are held in part, by ranks that run the same stage together."""

    def seen(self) -> AbstractContextManager[None]:
        """Entered for each run, inside of which the model's code sees them whole."""

    def gathered(self, tree: Any) -> Any:
        """Values without those that are cut themselves. Called by these ranks together."""


class StagePart:
    """One stage of a model. A rank with several stages has one of these for each, over the same model.

    `stages` has the stage of every unit (`find_units`), `escapes` the modules whose outputs leave units
    through
    hooks, and `shapes` the full shapes of parameters of which this rank holds a part, by FQN. Between runs
    the model is as it was. Raises ConfigError for stages that do not fit the model, and for a model that
    checkpoints its own blocks: the recomputation would wait for messages a second time.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        stages: Mapping[str, int],
        num_stages: int,
        escapes: Sequence[str] = (),
        *,
        shapes: Shapes | None = None,
        cuts: Cuts | None = None,
    ) -> None:
        if not 0 <= stage < num_stages or any(not 0 <= each < num_stages for each in stages.values()):
            raise ConfigError(
                f"Stage {stage} of {num_stages}, with units in stages {sorted(set(stages.values()))}.",
                f"Stages are numbered from 0 to {num_stages - 1}.",
                "Make the plan again.",
            )
        _refuse_own_checkpointing(model)
        self.model, self.stage, self.num_stages = model, stage, num_stages
        self._stages, self._escapes = dict(stages), tuple(escapes)
        self._units = {name: model.get_submodule(name) for name in stages}
        self._used = parameter_stages(model, stages)
        self._real: nn.Parameter | None = None  # one that is here
        self._skeletons = {
            name: Skeletons(name, unit, escapes, shapes or {}, self._device)
            for name, unit in self._units.items()
            if stages[name] != stage
        }
        self._shapes, self._cuts = shapes or {}, cuts
        self._known: dict[Hashable, Crossings] = {}

    def crossings(self, signature: Hashable) -> Crossings | None:
        """What crosses for inputs of this signature in the model's present mode; None before its "
        "first run."""
        return self._known.get(self._key(signature))

    def run(
        self,
        forward: Callable[[], T],
        receive: Receive,
        *,
        signature: Hashable = None,
        rng_state: Sequence[torch.Tensor] | None = None,
    ) -> PartResult[T]:
        """Runs `forward()`, which calls the model, as far as this stage needs it.

        `receive(skeleton)` is called for each value that crosses into this stage, in the order of
        crossing. It
        returns the real value, detached, which requires a gradient exactly where the skeleton does.
        With a `signature` (`signature_of(batch)`) what crosses is remembered, and the next run of the same
        ends after the last value to be sent. Raises PartialForwardError for what cannot be done in parts.
        """
        if rng_state is not None:
            _set_rng_state(self._device(), rng_state)
        key = self._key(signature) if signature is not None else None
        known = self._known.get(key) if key is not None else None
        ends = (len(known.received), len(known.sent), known.unit_calls) if known is not None else None
        is_last = self.stage == self.num_stages - 1
        mode = StageMode(
            stage=self.stage,
            last=self.num_stages - 1,
            device=self._device(),
            homes=self._homes(),
            receive=receive,
            ends=None if is_last else ends,
            leaving=None if self._cuts is None else self._cuts.gathered,
        )
        output: T | None = None
        with self._installed(mode):
            try:
                with self._seen(), mode:
                    result = forward()
                mode.finish(result)
                output = result if is_last else None
            except Left:  # before its end: nothing more of it belongs to this stage
                pass
        mode.check_sent()
        found = Crossings(
            received=tuple(map(Form.of, mode.received)),
            sent=tuple(map(Form.of, mode.sent)),
            unit_calls=mode.unit_calls,
        )
        self._check_same(known, found)
        if key is not None:
            self._known[key] = found
        return PartResult(
            output=output,
            sent=tuple(mode.sent),
            received=tuple(mode.received),
            rng_state=_rng_state(self._device()),
        )

    def _seen(self) -> AbstractContextManager[None]:
        return nullcontext() if self._cuts is None else self._cuts.seen()

    def _check_same(self, known: Crossings | None, found: Crossings) -> None:
        if known is not None and (known.received, known.sent) != (found.received, found.sent):
            raise ConfigError(
                f"Stage {self.stage} received {len(found.received)} and sends {len(found.sent)} "
                f"values, other "
                f"ones than for an earlier batch of the same form.",
                "What crosses depends on the form of the batch alone, not on its numbers.",
                "Give runs that differ another signature.",
            )

    @contextmanager
    def _installed(self, mode: StageMode) -> Iterator[None]:
        """Units call the mode in the place of their forwards; whatever stood there is put back."""
        for skeletons in self._skeletons.values():
            skeletons.built()
        before = {name: unit.__dict__.get("forward") for name, unit in self._units.items()}
        handles = []
        for name, unit in self._units.items():
            stage, own = self._stages[name], unit.forward
            if stage == self.stage:
                unit.__dict__["forward"] = partial(mode.run_own, name, own)
            else:
                unit.__dict__["forward"] = partial(
                    mode.run_absent, name, stage, self._skeletons[name], self.model
                )
        for escape in self._escapes:
            if self._stage_of(escape) == self.stage:
                hook = partial(_tag_outputs, mode)
                handles.append(self.model.get_submodule(escape).register_forward_hook(hook, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, unit in self._units.items():
                del unit.__dict__["forward"]
                if before[name] is not None:
                    unit.__dict__["forward"] = before[name]

    def _stage_of(self, name: str) -> int:
        return next(stage for unit, stage in self._stages.items() if name.startswith(f"{unit}."))

    def _homes(self) -> dict[int, tuple[tuple[int, ...], tuple[int, ...] | None]]:
        """By tensor: the stages that have this parameter, and its full shape where this rank has a part."""
        return {
            id(parameter): (self._used[name], tuple(self._shapes[name]) if name in self._shapes else None)
            for name, parameter in self.model.named_parameters()
        }

    def _device(self) -> torch.device:
        """Where this rank computes: where its parameters are that are not on meta."""
        if self._real is None or self._real.is_meta:
            self._real = next((each for each in self.model.parameters() if not each.is_meta), None)
        return torch.device("cpu") if self._real is None else self._real.device

    def _key(self, signature: Hashable) -> Hashable:
        kind = self._device().type
        casting = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return (signature, self.model.training, torch.is_grad_enabled(), casting)


def _tag_outputs(mode: StageMode, module: nn.Module, args: Any, output: Any) -> Any:
    return mode.tag_own(output)


def _refuse_own_checkpointing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            raise ConfigError(
                f"{name or type(model).__name__} checkpoints its own activations (gradient_checkpointing).",
                "In a pipeline its recomputation would wait for the messages of other stages again.",
                "Call model.gradient_checkpointing_disable() and let the engine recompute: "
                "activation='full'.",
            )


def _rng_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    cuda = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *cuda)


def _set_rng_state(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1].cpu(), device)
