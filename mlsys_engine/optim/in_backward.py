"""Stepping inside the backward: each parameter is updated as its gradient finishes, which is then freed.

Memory then holds the gradients of one layer instead of all. Lv et al. 2023 ("LOMO") describe the idea and its
two ways to clip by the global norm, which is known only when the last gradient has come.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.checks import check_max_grad_norm
from mlsys_engine.optim.gradient_norm import GradientNorm
from mlsys_engine.optim.norms import clip_scale
from mlsys_engine.optim.operands import read_hyper
from mlsys_engine.optim.parameter_step import ParameterStep, SoleGradientStep, parameter_step
from mlsys_engine.optim.plan import same, shape_of_groups

CLIP_MODES = ("previous", "two_pass")


def step_in_backward(
    optimizer: NativeOptimizer,
    *,
    max_grad_norm: float | None = None,
    clip: str = "previous",
    accumulate: int = 1,
) -> StepInBackward:
    """From now on every `accumulate`-th backward steps `optimizer`, parameter by parameter.

    Call it once, before training; `remove()` of what it returns, or leaving it as a context manager, ends it.
    Without clipping the results have the same bits as backward, `step()`, `zero_grad()`.

    clip="previous" clips by the norm of the previous step: the first backward only measures and updates
    nothing, and a parameter whose gradient is not finite is left alone, with its step count.
    clip="two_pass" clips exactly: `handle.step(closure)` calls the closure twice, first to measure, then to
    step, with the same random numbers; when the norm is not finite, nothing is stepped.
    """
    return StepInBackward(optimizer, max_grad_norm=max_grad_norm, clip=clip, accumulate=accumulate)


class StepInBackward:
    """The hooks that step an optimizer inside the backward; see step_in_backward.

    Gradients must be complete when autograd has added them up: one process, or FSDP2. Checkpointing must not
    be reentrant. Other errors in a backward leave the gradients that have not been used.
    """

    def __init__(
        self, optimizer: NativeOptimizer, *, max_grad_norm: float | None, clip: str, accumulate: int
    ) -> None:
        check_max_grad_norm(max_grad_norm)
        _check(max_grad_norm, clip, accumulate)
        if not isinstance(optimizer, NativeOptimizer):
            raise ConfigError(
                f"step_in_backward() with {type(optimizer).__module__}'s {type(optimizer).__name__}.",
                "It steps the engine's own optimizers.",
                "Build one of mls.optim, which take the arguments of their namesakes.",
            )
        if not optimizer.separable:
            raise ConfigError(
                f"step_in_backward() with {type(optimizer).__name__}.",
                "It needs a rule that steps each parameter by itself, as AdamW and Lion do.",
                "Use one of them, or step after the backward.",
            )
        self._optimizer, self._accumulate = optimizer, accumulate
        self._limit = 0.0 if max_grad_norm is None else max_grad_norm
        self._two_pass = max_grad_norm is not None and clip == "two_pass"
        self._measures = max_grad_norm is not None  # whether this backward takes the norm
        self._updates = not self._two_pass  # whether this backward steps parameters
        self._scale: float | Tensor = 1.0
        self._norm: GradientNorm | None = None  # of the backward under way
        self._sum_of_squares: Tensor | None = None  # of the last one
        self._usable: Tensor | None = None  # the last finite one, which the next step is clipped by
        self._num_backwards = 0  # since the last step
        self._task: int | None = None  # autograd's number of the backward under way
        self._done: set[Tensor] = set()
        self._is_last = self._finished = False
        self._inside_closure = False
        self._lock = threading.Lock()
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._steps: dict[Tensor, SoleGradientStep | ParameterStep] = {}
        self._hyper: Tensor | None = None  # of this backward
        self._params: list[Tensor] = []
        self._shape: Any = None
        self._positions: dict[Tensor, int] = {}
        self._refresh()

    def step(self, closure: Callable[[], Any]) -> Any:
        """clip="two_pass": calls `closure`, which runs `accumulate` backwards, twice; returns its first loss.

        torch's random numbers are the same in both calls; whatever else the closure changes, changes twice.
        """
        if not self._two_pass:
            raise ConfigError(
                'step(closure) was called without clip="two_pass".',
                "Other modes step inside backward() itself.",
                'Call backward() alone, or set max_grad_norm and clip="two_pass".',
            )
        devices = {p.device.index for p in self._optimizer._parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
            loss = self._pass(closure, updates=False)
        if self._sum_of_squares is not None and bool(self._sum_of_squares.isfinite()):
            self._scale = clip_scale(self._sum_of_squares, self._limit)
            self._pass(closure, updates=True)
        return loss

    def flush(self) -> None:
        """Steps what fewer than `accumulate` backwards have accumulated, as at the end of an epoch."""
        if self._two_pass:
            raise ConfigError(
                'flush() was called with clip="two_pass".',
                "Its closure runs all backwards of a step.",
                "Give the last closure fewer microbatches by a handle with a smaller `accumulate`.",
            )
        if any(parameter.grad is not None for parameter in self._optimizer._parameters()):
            self._begin(last=True)
            self._finish()

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before clipping, 0-d float64; None without clipping."""
        return None if self._sum_of_squares is None else self._sum_of_squares.sqrt()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits; save it between steps."""
        return {"sum_of_squares": None if self._usable is None else self._usable.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the previous step's norm."""
        self._usable = state["sum_of_squares"]

    def remove(self) -> None:
        """Ends stepping inside the backward; the optimizer is as ever."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._steps.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # ---- one backward

    def _pass(self, closure: Callable[[], Any], *, updates: bool) -> Any:
        self._measures, self._updates = not updates, updates
        self._num_backwards, self._finished, self._inside_closure = 0, False, True
        try:
            with torch.enable_grad():
                result = closure()
        finally:
            self._inside_closure = False
        if not self._finished or self._num_backwards:
            raise ConfigError(
                f"The closure ran another number of backwards than accumulate={self._accumulate}.",
                "Each call must run exactly the backwards of one step.",
                "Set accumulate to the number of microbatches in the closure.",
            )
        return result

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        with self._lock:  # autograd has a thread for each device
            task = torch._C._current_graph_task_id()
            if self._task != task:
                # Also where the backward before has raised, so that its end never came.
                self._begin(last=False)
                self._task = task
                torch.autograd.Variable._execution_engine.queue_callback(self._end)
        if self._is_last and parameter in self._positions:
            self._use(parameter)

    def _begin(self, *, last: bool) -> None:
        if self._two_pass and not self._inside_closure:
            raise ConfigError(
                'A backward ran outside of step(closure) with clip="two_pass".',
                "Its gradients would be neither measured nor clipped.",
                "Call backward() in the closure alone, or remove() this handle first.",
            )
        if self._task is None:
            self._num_backwards += 1
        self._is_last = last or self._num_backwards >= self._accumulate
        self._done.clear()
        self._hyper = None
        if not self._is_last:
            return
        self._refresh()
        self._norm = GradientNorm(self._optimizer.name_of) if self._measures else None
        if self._measures and not self._two_pass:
            self._updates = self._usable is not None
            if self._usable is not None:
                self._scale = clip_scale(self._usable, self._limit)

    def _use(self, parameter: Tensor) -> None:
        """Measures and steps by a finished gradient, then frees it."""
        gradient = parameter.grad
        if gradient is None:
            return
        skip: bool | Tensor = False
        if self._norm is not None:
            self._norm.add(parameter, gradient)
            if self._updates:
                own = self._norm.of(parameter)
                skip = not math.isfinite(own) if own.device.type == "cpu" else ~own.isfinite()
        if self._updates:
            self._ready(parameter)(gradient, self._read_hyper, self._scale, skip)
        parameter.grad = None
        self._done.add(parameter)

    @torch.no_grad()
    def _end(self) -> None:
        self._task = None
        if self._is_last:
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """After the last gradient: those that only earlier microbatches gave, and the norm."""
        for parameter in self._params:
            if parameter.grad is not None and parameter not in self._done:
                self._use(parameter)
        if self._norm is not None:
            self._sum_of_squares = total = self._norm.sum_of_squares(self._params)
            self._norm = None
            if self._usable is not None:
                self._usable = torch.where(total.isfinite(), total, self._usable)
            elif bool(total.isfinite()):
                self._usable = total
        self._num_backwards, self._finished = 0, True
        self._done.clear()
        self._optimizer._opt_called = True  # what torch's schedulers look at
        self._refresh()

    # ---- what is kept from step to step

    def _ready(self, parameter: Tensor) -> SoleGradientStep | ParameterStep:
        ready = self._steps.get(parameter)
        if ready is None or not ready.is_current():
            ready = parameter_step(self._optimizer, self._params, self._positions[parameter])
            self._steps[parameter] = ready
        return ready

    def _read_hyper(self) -> Tensor:
        if self._hyper is None:
            self._hyper = read_hyper(self._optimizer)
        return self._hyper

    def _refresh(self) -> None:
        """Follows edits of the groups: parameters that came, left, moved, or began to require gradients."""
        params, shape = self._optimizer._parameters(), shape_of_groups(self._optimizer)
        if shape != self._shape or not same(params, self._params):
            self._params, self._shape = params, shape
            self._positions = {parameter: position for position, parameter in enumerate(params)}
            self._steps.clear()
            for parameter in [one for one in self._hooks if one not in self._positions]:
                self._hooks.pop(parameter).remove()
        for parameter in params:
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._on_gradient)


def _check(max_grad_norm: float | None, clip: str, accumulate: int) -> None:
    if clip not in CLIP_MODES:
        raise ConfigError(
            f"clip={clip!r} was given.",
            f"One of {', '.join(CLIP_MODES)} is expected.",
            did_you_mean(clip, CLIP_MODES),
        )
    if clip == "two_pass" and max_grad_norm is None:
        raise ConfigError(
            'clip="two_pass" was given without max_grad_norm.',
            "There is nothing to clip by.",
            "Set max_grad_norm, or leave clip out.",
        )
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigError(
            f"accumulate={accumulate} was given.",
            "The number of backwards a step, at least 1, is expected.",
            "Leave it out, or count your microbatches.",
        )
