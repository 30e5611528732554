"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018), with its state on the device.

The loss is multiplied by a scale before backward, so that small gradients do not vanish in fp16, and
gradients are divided by it as the optimizer reads them. A step with an inf or nan is skipped and lowers the
scale; after `growth_interval` steps in a row without one it grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.numerics import GradientScale, gradient_scale
from mlsys_engine.optim.checks import check_max_grad_norm
from mlsys_engine.optim.norms import sum_of_squares


@runtime_checkable
class _ScalesWhileStepping(Protocol):
    """What the engine's own optimizers offer."""

    def sum_of_squares(self) -> Tensor: ...

    def step_scaled(self, *, grad_scale: float | Tensor, skip: bool | Tensor) -> None: ...


class LossScaler:
    """Scales losses, and unscales, clips, tests and steps in one go; grows as torch.amp.GradScaler does.

        scaler.scale(loss).backward()
        scaler.step(optimizer, max_grad_norm=1.0)
        scaler.update()

    With the engine's optimizers, and with torch's fused ones, nothing waits for the device: the scale, the
    test and the count of good steps are tensors there, and a skipped step is one that the kernels leave out.
    Other optimizers are stepped by Python, which has to wait for the test. `enabled=False` makes all of it an
    ordinary step, which still clips. Raises ConfigError for settings that cannot work.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        _check_settings(init_scale, growth_factor, backoff_factor, growth_interval)
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.enabled = growth_interval, enabled
        self._init_scale = init_scale
        self._start = (float(init_scale), 0)  # scale and good steps, until the device is known
        self._scale: Tensor | None = None  # float32 as in torch, 0-d
        self._good_steps: Tensor | None = None  # int32, 0-d
        self._found_inf: Tensor | None = None  # bool, 0-d: in any step since the last update

    def __repr__(self) -> str:
        return (
            f"LossScaler(init_scale={self._init_scale}, growth_factor={self.growth_factor}, "
            f"backoff_factor={self.backoff_factor}, growth_interval={self.growth_interval}, "
            f"enabled={self.enabled})"
        )

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale: call backward on it. A 0-d half-precision loss becomes float32."""
        return loss * self.current(loss.device) if self.enabled else loss

    def current(self, device: torch.device | str) -> Tensor:
        """The present scale, a 0-d float32 tensor on `device`; `update` writes into it."""
        if not self.enabled:
            return torch.ones((), device=device)
        if self._scale is None:
            scale, good_steps = self._start
            self._scale = torch.tensor(scale, dtype=torch.float32, device=device)
            self._good_steps = torch.tensor(good_steps, dtype=torch.int32, device=device)
        return self._scale.to(device, non_blocking=True)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> Tensor:
        """Steps with the gradients divided by the scale and clipped to `max_grad_norm`, or skips.

        Returns the global 2-norm of the unscaled gradient before clipping (float64, 0-d, on its device); inf
        or nan when the step was skipped. `.grad` keeps the scaled gradient with the engine's optimizers; with
        torch's it is what was stepped, or the scaled gradient of a skipped step. Call `update` after the
        steps of all optimizers.
        """
        check_max_grad_norm(max_grad_norm)
        native = optimizer if isinstance(optimizer, _ScalesWhileStepping) else None
        grads = [] if native else _gradients(optimizer)
        squares = native.sum_of_squares() if native else sum_of_squares(grads)
        factor = gradient_scale(squares, self.current(squares.device).to(torch.float64), max_grad_norm)
        if self.enabled:
            self.observe(~torch.isfinite(squares))
        skip = factor.skip if self.enabled else torch.zeros_like(factor.skip)
        if native:
            native.step_scaled(grad_scale=factor.scale, skip=skip)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            _step_fused(optimizer, factor, skip)
        elif not skip:
            _multiply(grads, factor.scale)
            optimizer.step()
        return factor.norm

    def observe(self, found_inf: Tensor) -> None:
        """Tells of a gradient whether it holds inf or nan (0-d bool), for the next `update`."""
        self._found_inf = found_inf if self._found_inf is None else self._found_inf | found_inf

    @torch.no_grad()
    def update(self) -> None:
        """Lowers the scale after an inf or nan, grows it after enough steps without; once an iteration."""
        if not self.enabled:
            return
        if self._found_inf is None:
            raise ConfigError(
                "LossScaler.update() was called without a step before it.",
                "update() follows the steps of all optimizers of an iteration, and is called once.",
                "Call scaler.step(optimizer) first.",
            )
        scale, found_inf = self.current(self._found_inf.device), self._found_inf
        assert self._scale is not None and self._good_steps is not None
        good_steps = self._good_steps.to(scale.device) + 1
        # Multiplied in double and rounded once, as torch does it.
        grown = (scale.double() * self.growth_factor).float()
        lowered = (scale.double() * self.backoff_factor).float()
        grows = good_steps >= self.growth_interval
        larger = torch.where(grows & torch.isfinite(grown), grown, scale)
        # In place, so that a captured graph finds its own results when it is replayed.
        self._scale.copy_(torch.where(found_inf, lowered, larger))
        self._good_steps.copy_(torch.where(found_inf | grows, torch.zeros_like(good_steps), good_steps))
        self._found_inf = None

    def get_scale(self) -> float:
        """The present scale as a number; waits for the device."""
        if not self.enabled:
            return 1.0
        return self._start[0] if self._scale is None else float(self._scale)

    def state_dict(self) -> dict[str, Any]:
        """Plain values under torch.amp.GradScaler's keys; empty when disabled. Waits for the device."""
        if not self.enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._start[1] if self._good_steps is None else int(self._good_steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`'s values, ours or torch.amp.GradScaler's."""
        if not self.enabled:
            return
        if missing := self.state_dict().keys() - state.keys():
            raise CheckpointError(
                f"A loss scaler's state without {', '.join(sorted(missing))}.",
                "It is that of an enabled LossScaler or torch.amp.GradScaler.",
                "Start with a new LossScaler instead; it finds its scale within a few steps.",
            )
        scale, good_steps = float(state["scale"]), int(state["_growth_tracker"])
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        self._start = (scale, good_steps)
        self._scale = self._good_steps = self._found_inf = None


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in params if parameter.grad is not None]


def _step_fused(optimizer: torch.optim.Optimizer, factor: GradientScale, skip: Tensor) -> None:
    """torch's fused kernels divide by `grad_scale` and skip by `found_inf`, both read on the device."""
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = factor.scale.reciprocal().float(), skip.float()
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


def _multiply(grads: Sequence[Tensor], factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    for device, members in by_device.items():
        torch._foreach_mul_(members, factor.to(device))


def _check_settings(
    init_scale: float, growth_factor: float, backoff_factor: float, growth_interval: int
) -> None:
    found: tuple[tuple[bool, str, str, str], ...] = (
        (
            math.isfinite(init_scale) and init_scale > 0,
            f"init_scale={init_scale}",
            "The scale is a positive number.",
            "Leave it out for 2**16.",
        ),
        (
            math.isfinite(growth_factor) and growth_factor > 1,
            f"growth_factor={growth_factor}",
            "The scale grows by a factor above 1.",
            "Leave it out for 2.",
        ),
        (
            0 < backoff_factor < 1,
            f"backoff_factor={backoff_factor}",
            "The scale is lowered by a factor between 0 and 1.",
            "Leave it out for 0.5.",
        ),
        (
            isinstance(growth_interval, int) and growth_interval >= 1,
            f"growth_interval={growth_interval}",
            "It is a whole number of steps, at least 1.",
            "Leave it out for 2000.",
        ),
    )
    for is_so, given, expected, action in found:
        if not is_so:
            raise ConfigError(f"LossScaler({given}).", expected, action)
