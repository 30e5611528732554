"""How an optimizer takes the reduced gradient: the engine's own in one sweep, any other of torch's in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from mlsys_engine.data_parallel import state
from mlsys_engine.data_parallel.arenas import ModelArenas
from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import FlatArena
from mlsys_engine.memory.flat_shard import FlatShard
from mlsys_engine.numerics import GradientScale

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@runtime_checkable
class ScaledStep(Protocol):
    """What an optimizer offers that scales the gradient while it steps (mlsys_engine.optim's all do)."""

    def adopt(self, params: FlatArena, grads: FlatArena) -> None: ...

    def sum_of_squares(self) -> torch.Tensor: ...

    def step_scaled(self, *, grad_scale: float | torch.Tensor, skip: bool | torch.Tensor) -> None: ...


class Update(Protocol):
    """The last part of a step, over gradients that are summed and in place."""

    def sum_of_squares(self) -> torch.Tensor:
        """Of the summed gradient, 0-d float64."""

    def step(self, scale: GradientScale) -> None:
        """Multiplies the gradient by `scale.scale` and steps; does nothing at all where `scale.skip`."""

    def optimizer_state(self, model: nn.Module, full: bool) -> dict[str, Any]:
        """As Runner.state_dict has it; live tensors, or with `full` private copies."""

    def load_optimizer_state(self, model: nn.Module, loaded: Mapping[str, Any]) -> None:
        """Takes over what `optimizer_state` returned, here or under another layout."""

    def place_state(self, name: str, key: str) -> FlatShard | None:
        """Where a checkpoint's piece `key` of the state of parameter `name` is loaded to; None: anywhere."""


class _WholeState:
    """The state of an optimizer that keeps all of it on every rank."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._whole = optimizer

    def optimizer_state(self, model: nn.Module, full: bool) -> dict[str, Any]:
        return state.optimizer_state(self._whole, model, full)

    def load_optimizer_state(self, model: nn.Module, loaded: Mapping[str, Any]) -> None:
        state.load_optimizer_state(self._whole, model, loaded)

    def place_state(self, name: str, key: str) -> FlatShard | None:
        return None


class FusedUpdate(_WholeState):
    """Scaling is part of the optimizer's own sweep; `.grad` keeps the unscaled sum.

    `counted` has what the norm is of where it is not of everything.
    """

    def __init__(
        self, optimizer: ScaledStep, arenas: ModelArenas, counted: Sequence[torch.Tensor] | None = None
    ) -> None:
        super().__init__(cast(torch.optim.Optimizer, optimizer))
        self._optimizer, self._counted = optimizer, counted
        for pair in arenas.pairs.values():
            optimizer.adopt(pair.parameters, pair.gradients)

    def sum_of_squares(self) -> torch.Tensor:
        return self._optimizer.sum_of_squares() if self._counted is None else _squares(self._counted)

    def step(self, scale: GradientScale) -> None:
        self._optimizer.step_scaled(grad_scale=scale.scale, skip=scale.skip)


class PlainUpdate(_WholeState):
    """For any torch.optim.Optimizer: scales the arenas, then steps. Waits for the device to know `skip`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        arenas: ModelArenas,
        counted: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._optimizer = optimizer
        self._gradients = [pair.gradients.data for pair in arenas.pairs.values()]
        self._counted = self._gradients if counted is None else counted

    def sum_of_squares(self) -> torch.Tensor:
        return _squares(self._counted)

    def step(self, scale: GradientScale) -> None:
        if scale.skip:
            return
        for flat in self._gradients:
            flat.mul_(scale.scale)
        self._optimizer.step()


def make_optimizer(
    factory: OptimizerFactory, named: Sequence[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Calls the factory with the named trainable parameters; raises ConfigError for what cannot work."""
    if isinstance(factory, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer= is a {type(factory).__name__} that already exists.",
            "optimizer= is a factory that is called with the model's (name, parameter) pairs.",
            f"Pass functools.partial({type(factory).__name__}, lr=...) instead.",
        )
    if not callable(factory):
        raise ConfigError(
            f"optimizer={factory!r}.",
            "optimizer= is a factory that is called with the model's (name, parameter) pairs.",
            "Pass functools.partial(mls.optim.AdamW, lr=...).",
        )
    if not named:
        raise ConfigError(
            "The model has no parameter that requires a gradient.",
            "An optimizer needs at least one.",
            "Set requires_grad on what should be trained, or use the model without a runner.",
        )
    try:
        optimizer: Any = factory(list(named))
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        raise _without_parameters() from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"The optimizer factory returned a {type(optimizer).__name__}.",
            "It returns a torch.optim.Optimizer over the parameters it was given.",
            "Pass functools.partial(mls.optim.AdamW, lr=...).",
        )
    _check_parameters(optimizer, named)
    return optimizer


def _check_parameters(optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """An optimizer may leave parameters out, but it has some, and only this model's trainable ones."""
    taken = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not taken:
        raise _without_parameters()
    own = {parameter for _, parameter in named}
    strangers = [parameter for parameter in taken if parameter not in own]
    if strangers:
        raise ConfigError(
            f"The optimizer has {len(strangers)} parameters that are not this model's trainable ones, "
            f"the first of shape {tuple(strangers[0].shape)}.",
            "It steps parameters from the (name, parameter) pairs that the factory is called with.",
            "Build it from those pairs: optimizer=functools.partial(mls.optim.AdamW, lr=...).",
        )


def _without_parameters() -> ConfigError:
    return ConfigError(
        "The optimizer factory made an optimizer without parameters.",
        "It is called with the model's trainable (name, parameter) pairs and takes at least one of them.",
        "Pass functools.partial(mls.optim.AdamW, lr=...), or check what the factory filters.",
    )


def make_update(
    optimizer: torch.optim.Optimizer, arenas: ModelArenas, counted: Sequence[bool] | None = None
) -> Update:
    """The way in which this optimizer is stepped. `counted`: the buckets that the norm is of; None: all."""
    flats = (
        None
        if counted is None or all(counted)
        else [bucket.gradients for bucket in arenas.buckets if counted[bucket.index]]
    )
    if isinstance(optimizer, ScaledStep):
        return FusedUpdate(optimizer, arenas, flats)
    return PlainUpdate(optimizer, arenas, flats)


def _squares(flats: Sequence[torch.Tensor]) -> torch.Tensor:
    # Padding and the places of unused parameters are zero, so whole ranges can be summed.
    norms = [torch.linalg.vector_norm(flat, dtype=torch.float64) for flat in flats]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
