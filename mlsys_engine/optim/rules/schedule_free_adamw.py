"""Schedule-free AdamW (Defazio et al. 2024): an average of the iterates instead of a schedule and its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.base import Group, NativeOptimizer
from mlsys_engine.optim.checks import check_range
from mlsys_engine.optim.formats import MASTER_KEY, Precision
from mlsys_engine.optim.rules.adam_family import adam_hyper, check_adam_group

Scalar = float | Tensor
# The group's own scalar state: steps so far, the largest warmed-up rate, the sum of the average's weights,
# and the present step's rate and its share of the average.
AVERAGE_KEYS = ("k", "lr_max", "weight_sum", "scheduled_lr", "share")


class ScheduleFreeAdamW(NativeOptimizer):
    """AdamW without a schedule, on float32 parameters: 28 bytes moved and 16 stored a parameter.

    In training parameters hold y, where gradients are taken; call `eval()` before evaluating or exporting the
    model, which turns them into the average x, and `train()` before the next step. Step t weighs t^r lr^p in
    the average, p = `weight_lr_power`; the rate rises linearly over the first `warmup_steps`.
    """

    rule: ClassVar[str] = "schedule_free_adamw"
    counts_steps: ClassVar[bool] = True
    moment_kinds: ClassVar[Mapping[str, str]] = {"exp_avg_sq": "unsigned"}  # z are weights
    shardable: ClassVar[bool] = False  # eval() needs the whole of z, and each step the group's own scalars
    separable: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        maximize: bool = False,
        **precision: Unpack[Precision],
    ) -> None:
        # Of parameters that hold x: their y, and the version of the tensor that x was written as.
        self._training: dict[Tensor, tuple[Tensor, int]] = {}
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "maximize": maximize,
                "differentiable": False,
                "train_mode": True,
                "k": 0,
                "lr_max": 0.0,
                "weight_sum": 0.0,
                "scheduled_lr": 0.0,
                "share": 0.0,
            },
            precision,
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return "z", "exp_avg_sq"

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        return *adam_hyper({**group, "lr": group["scheduled_lr"]}), group["share"]

    def check_group(self, group: Group) -> None:
        check_adam_group(group, "Switch it off.")
        for name in ("warmup_steps", "weight_lr_power"):
            check_range(name, group[name])
        check_range("r", group["r"], low=-1.0)
        if group["betas"][0] == 0:
            raise ConfigError(
                "betas[0]=0 was given.",
                "Gradients at z alone leave no way back from the average to it.",
                "Choose betas[0] above 0, 0.9 as a rule, or use AdamW.",
            )

    # ---- training and evaluation

    @torch.no_grad()
    def eval(self) -> None:
        """Turns every parameter into the average x; for evaluation, export and what else is not training."""
        for group in self.param_groups:
            if not group["train_mode"]:
                continue
            group["train_mode"] = False
            for parameter in group["params"]:
                if (z := self.state.get(parameter, {}).get("z")) is not None:
                    training = parameter.detach().clone()
                    # x = y + (1 - 1 / beta1) (z - y)
                    parameter.copy_(parameter.float().lerp(z, 1 - 1 / group["betas"][0]))
                    self._training[parameter] = training, parameter._version

    @torch.no_grad()
    def train(self) -> None:
        """Turns every parameter into y again, to the bit where nobody has changed it since `eval()`."""
        for group in self.param_groups:
            if group["train_mode"]:
                continue
            group["train_mode"] = True
            for parameter in group["params"]:
                training, version = self._training.pop(parameter, (None, -1))
                if training is not None and parameter._version == version:
                    parameter.copy_(training)
                elif (z := self.state.get(parameter, {}).get("z")) is not None:
                    parameter.copy_(parameter.float().lerp(z, 1 - group["betas"][0]))
                    for key in MASTER_KEY.values():  # of the weights that are no more
                        self.state[parameter].pop(key, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._training = {}

    # ---- the step

    def _advance(self, grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool = False) -> None:
        for number, group in enumerate(self.param_groups):
            if not group["train_mode"]:
                raise ConfigError(
                    f"ScheduleFreeAdamW.step() while group {number} is in evaluation.",
                    "A step starts from the training weights y, and the parameters hold the average x.",
                    "Call optimizer.train() before the forward pass, and optimizer.eval() to evaluate.",
                )
        before = [{key: group[key] for key in AVERAGE_KEYS} for group in self.param_groups]
        if not isinstance(skip, Tensor) or skip.device.type == "cpu":
            if bool(skip):
                return
            kept: Scalar = 1.0
        else:
            kept = 1.0 - skip.double()
        try:
            for group in self.param_groups:
                if any(parameter.grad is not None for parameter in group["params"]):
                    _advance_average(group, kept)
            super()._advance(grad_scale, skip, zero_grad)
        except Exception:  # whatever refused the step: nothing has stepped, so the averages must not count it
            for group, values in zip(self.param_groups, before, strict=True):
                group.update(values)
            raise

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        (beta1, beta2), share, rate = group["betas"], group["share"], group["scheduled_lr"]
        for parameter, gradient, is_fresh in zip(params, grads, fresh, strict=True):
            state = self.state[parameter]
            state["step"] += 1
            z, second = state["z"], state["exp_avg_sq"]
            if is_fresh:
                z.copy_(parameter)
            gradient = -gradient if group["maximize"] else gradient  # noqa: PLW2901
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            update = gradient / root
            if group["weight_decay"] != 0:
                update += group["weight_decay"] * parameter
            parameter.add_(share * (z - parameter)).sub_(rate * (1 - beta1 * (1 - share)) * update)
            z.sub_(rate * update)


def _advance_average(group: Group, kept: Scalar) -> None:
    """This step's rate and share; a step that is skipped (kept 0, known to the device alone) adds nothing."""
    count = group["k"] + 1.0
    warm = _smaller(count / group["warmup_steps"], 1.0) if group["warmup_steps"] > 0 else 1.0
    rate = group["lr"] if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu" else None
    scheduled = (float(group["lr"]) if rate is None else rate.double()) * warm
    largest = _larger(scheduled, group["lr_max"])
    weight = count ** group["r"] * largest ** group["weight_lr_power"]
    total = group["weight_sum"] + weight
    group["scheduled_lr"], group["share"] = scheduled, _share(weight, total)
    group["k"] = group["k"] + (1 if kept == 1.0 and not isinstance(kept, Tensor) else kept)
    group["lr_max"] = group["lr_max"] + kept * (largest - group["lr_max"])
    group["weight_sum"] = group["weight_sum"] + kept * weight


def _share(weight: Scalar, total: Scalar) -> Scalar:
    if isinstance(total, Tensor):
        return torch.where(total > 0, weight / total, torch.zeros_like(total))
    return weight / total if total > 0 else 0.0


def _smaller(value: Scalar, limit: float) -> Scalar:
    return value.clamp(max=limit) if isinstance(value, Tensor) else min(value, limit)


def _larger(left: Scalar, right: Scalar) -> Scalar:
    tensors = [side for side in (left, right) if isinstance(side, Tensor)]
    if not tensors:
        return max(left, right)
    both = [torch.as_tensor(side, dtype=torch.float64, device=tensors[0].device) for side in (left, right)]
    return torch.maximum(*both)
