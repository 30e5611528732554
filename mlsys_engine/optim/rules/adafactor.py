"""Adafactor (Shazeer & Stern 2018): torch.optim.Adafactor's semantics, natively on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.memory.flat_arena import FlatArena
from mlsys_engine.optim.base import Group, NativeOptimizer
from mlsys_engine.optim.checks import check_flag_is_off, check_gradient, check_range, describe
from mlsys_engine.optim.kernels import is_native, operators
from mlsys_engine.optim.operands import hyper_table

Stepped = tuple[Tensor, Tensor, dict[str, Any], int]  # parameter, gradient, state, number of its group


class Adafactor(NativeOptimizer):
    """Drop-in for torch.optim.Adafactor on float32 parameters: 24 bytes moved and 8 stored a matrix element.

    Matrices (of the last two dimensions) keep the means of the squared gradient by row and by column, vectors
    all of it. `lr` bounds the relative step size and sets the decay; the step size follows the parameter's
    own size. Sums are in double and in a fixed order, so the bits do not depend on threads. On other devices
    than the CPU torch's own implementation steps, and waits for the device.
    """

    rule: ClassVar[str] = "adafactor"
    counts_steps: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False  # means and clipping are of whole tensors
    shardable: ClassVar[bool] = False

    def __init__(  # noqa: PLR0917 (torch's own signature)
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "beta2_decay": beta2_decay,
                "eps": eps,
                "d": d,
                "weight_decay": weight_decay,
                "foreach": None,  # torch's, kept so that state dictionaries have the same keys
                "maximize": maximize,
            },
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return "row_var", "col_var", "variance"  # of which a parameter has the first two or the last

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        eps1, eps2 = group["eps"]
        return (
            group["lr"],
            group["beta2_decay"],
            torch.finfo(torch.float32).eps if eps1 is None else eps1,
            eps2,
            group["d"],
            group["weight_decay"],
            -1.0 if group["maximize"] else 1.0,
        )

    def check_group(self, group: Group) -> None:
        check_range("lr", group["lr"])
        check_range("-beta2_decay", -group["beta2_decay"])
        if group["eps"][0] is not None:
            check_range("eps[0]", group["eps"][0])
        check_range("eps[1]", group["eps"][1])
        check_range("d", group["d"], low=1.0)
        check_range("weight_decay", group["weight_decay"])
        check_flag_is_off(group, "differentiable", "Switch it off.")
        if group["moments"] != "fp32" or group["ema"] is not None:
            raise ConfigError(
                f"moments={group['moments']!r}, ema={group['ema']} was given.",
                "Adafactor's means are float32 (they are small), and it keeps no average of the weights.",
                "Leave both out, or use another rule.",
            )

    def adopt(self, params: FlatArena, grads: FlatArena) -> None:
        """Nothing: sums are over whole tensors, so an arena is stepped tensor by tensor, wherever they
        lie."""

    # ---- the step

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as torch's, of float32 parameters."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype is not torch.float32:
                name = self.name_of(parameter)
                self.param_groups.pop()
                raise ConfigError(
                    f"{name} is {describe(parameter)}.",
                    "Adafactor steps float32 parameters.",
                    "Keep the model in float32 and run its forward under torch.autocast.",
                )

    def step_on(
        self,
        grads: list[Tensor | None],
        grad_scale: float | Tensor,
        skip: bool | Tensor,
        zero_grad: bool = False,
    ) -> None:
        """As every optimizer's, but `skip` is waited for."""
        if bool(skip):
            return
        params = self._parameters()
        numbers = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        present = [
            (parameter, gradient, number)
            for parameter, gradient, number in zip(params, grads, numbers, strict=True)
            if gradient is not None
        ]
        for parameter, gradient, _ in present:
            check_gradient(gradient, parameter, self.name_of(parameter))
        self._announce([parameter for parameter, _, _ in present if not _runs_on(parameter.device)])
        stepped = [(p, g, _ensured(self.state[p], p), number) for p, g, number in present]
        native = [item for item in stepped if _runs_on(item[0].device)]
        if native:
            self._native_step(native, float(grad_scale))
        for number, group in enumerate(self.param_groups):
            own = [item for item in stepped if item[3] == number and not _runs_on(item[0].device)]
            if own:
                self._torch_step(group, own, grad_scale)
        if zero_grad:
            torch._foreach_zero_([gradient for _, gradient, _ in present])

    def _native_step(self, stepped: Sequence[Stepped], grad_scale: float) -> None:
        steps = [state["step"] for _, _, state, _ in stepped]
        torch._foreach_add_(steps, 1.0)
        # The kernel walks contiguous tensors; others are stepped through copies.
        values = [parameter.contiguous() for parameter, _, _, _ in stepped]
        gradients = [gradient.float().contiguous() for _, gradient, _, _ in stepped]
        rows = [
            _row(value, gradient, state, number, index)
            for index, (value, gradient, (_, _, state, number)) in enumerate(
                zip(values, gradients, stepped, strict=True)
            )
        ]
        torch.autograd.graph.increment_version([parameter for parameter, _, _, _ in stepped])
        operators().adafactor_step(
            torch.tensor(rows, dtype=torch.int64), hyper_table(self), torch.stack(steps), grad_scale
        )
        for (parameter, _, _, _), value in zip(stepped, values, strict=True):
            if value.data_ptr() != parameter.data_ptr():
                parameter.copy_(value)

    def _torch_step(self, group: Group, stepped: Sequence[Stepped], grad_scale: float | Tensor) -> None:
        filled = [item for item in stepped if item[0].numel()]  # torch divides by the number of elements
        states = [state for _, _, state, _ in filled]
        torch.optim._adafactor.adafactor(
            [parameter for parameter, _, _, _ in filled],
            [gradient.float() * grad_scale for _, gradient, _, _ in filled],
            [state.get("row_var") for state in states],
            [state.get("col_var") for state in states],
            [state.get("variance") for state in states],
            [state["step"] for state in states],
            d=group["d"],
            lr=group["lr"],
            beta2_decay=group["beta2_decay"],
            weight_decay=group["weight_decay"],
            eps1=group["eps"][0],
            eps2=group["eps"][1],
            maximize=group["maximize"],
        )


def _runs_on(device: torch.device) -> bool:
    return device.type == "cpu" and is_native(device)


def _ensured(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The parameter's state, made at its first step, contiguous as the kernel needs it."""
    shape = tuple(parameter.shape)
    if parameter.ndim > 1:
        shapes = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
    else:
        shapes = {"variance": shape}
    if not state:
        state["step"] = torch.tensor(0.0)
        for name, expected in shapes.items():
            state[name] = torch.zeros(expected, dtype=torch.float32, device=parameter.device)
    for name, expected in shapes.items():
        current = state.get(name)
        if current is None or tuple(current.shape) != expected or state.get("step") is None:
            found = "missing" if current is None else f"of shape {tuple(current.shape)}"
            raise CheckpointError(
                f"The optimizer state {name} is {found}, for a parameter of shape {shape}.",
                f'{expected} is expected, and state["step"], as torch.optim.Adafactor saves them.',
                "Load the state that was saved with this model.",
            )
        if not current.is_contiguous():
            state[name] = current.contiguous()
    return state


def _row(value: Tensor, gradient: Tensor, state: dict[str, Any], group: int, index: int) -> list[int]:
    """One row of csrc/optim/adafactor.h."""
    if value.ndim > 1:
        rows, cols = value.shape[-2:]
        matrices = math.prod(value.shape[:-2])
        row_var, col_var = state["row_var"].data_ptr(), state["col_var"].data_ptr()
    else:
        matrices, rows, cols = 1, 1, value.numel()
        row_var, col_var = 0, state["variance"].data_ptr()
    addresses = [value.data_ptr(), gradient.data_ptr(), row_var, col_var]
    return [*addresses, matrices, rows, cols, group, index]
