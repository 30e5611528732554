"""The step of one parameter alone, kept ready: what stepping inside the backward calls for each gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlsys_engine.optim import distributed
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.device_steps import CpuStep, make_device_step
from mlsys_engine.optim.state import ensure_state


class SoleGradientStep:
    """A parameter's step by a rule with a `step_on` of its own: it is told that no other has a gradient."""

    def __init__(self, optimizer: NativeOptimizer, params: Sequence[Tensor], position: int) -> None:
        self._optimizer, self._num_params, self._position = optimizer, len(params), position

    def is_current(self) -> bool:
        """Always: nothing is kept here."""
        return True

    def __call__(
        self,
        gradient: Tensor,
        hyper: Callable[[], Tensor],
        grad_scale: float | Tensor,
        skip: bool | Tensor,
    ) -> None:
        """As ParameterStep's."""
        grads: list[Tensor | None] = [None] * self._num_params
        grads[self._position] = gradient
        self._optimizer.step_on(grads, grad_scale, skip)


def parameter_step(
    optimizer: NativeOptimizer, params: Sequence[Tensor], position: int
) -> SoleGradientStep | ParameterStep:
    """How `optimizer` steps the parameter at `position` of its `params` alone."""
    own = type(optimizer).step_on is not NativeOptimizer.step_on
    return (SoleGradientStep if own else ParameterStep)(optimizer, params, position)


class ParameterStep:
    """One parameter's segment table, bound to its state as it is now."""

    def __init__(self, optimizer: NativeOptimizer, params: Sequence[Tensor], position: int) -> None:
        self._optimizer, self._parameter = optimizer, params[position]
        (row,) = ensure_state(optimizer, params, [position])
        self._shard = row.parameter
        self._is_shard = row.parameter is not self._parameter
        self._part = make_device_step(optimizer, [row])
        self._counts, self._adopted = optimizer._steps, optimizer._adopted
        self._state = optimizer.state.get(self._parameter)
        self._values = dict(self._state or {})

    def is_current(self) -> bool:
        """Whether state and addresses are still the table's; whether groups are, the caller must see."""
        optimizer = self._optimizer
        state = optimizer.state.get(self._parameter)
        return (
            state is self._state
            and optimizer._steps is self._counts
            and optimizer._adopted is self._adopted
            and (state is None or all(state.get(key) is value for key, value in self._values.items()))
            and self._part.is_current()
            and (
                not self._is_shard or distributed.local(self._parameter).data_ptr() == self._shard.data_ptr()
            )
        )

    def __call__(
        self,
        gradient: Tensor,
        hyper: Callable[[], Tensor],
        grad_scale: float | Tensor,
        skip: bool | Tensor,
    ) -> None:
        """Steps the parameter by `gradient`; `hyper` gives what read_hyper does, for the CPU."""
        if self._is_shard:
            gradient = distributed.local_gradient(self._parameter, gradient, self._optimizer.name_of)
            torch.autograd.graph.increment_version(self._parameter)
        self._part.bind([gradient])
        if not isinstance(self._part, CpuStep):
            self._part.run(self._optimizer, grad_scale, skip, zero_grad=False)
        elif not bool(skip):
            self._part.launch(self._optimizer, hyper(), float(grad_scale), zero_grad=False)
