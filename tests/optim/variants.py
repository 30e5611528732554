"""Hyper-parameters under which each registered optimizer is tested, and error bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlsys_engine.optim import OPTIMIZERS, NativeOptimizer, optimizer_class

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adafactor": [
        {"lr": 1e-2},
        {"lr": 1e-2, "maximize": True, "weight_decay": 0.3, "eps": (1e-6, 0.1), "d": 1.5},
        {"lr": 1e-3, "beta2_decay": -0.5},
    ],
    "adagrad": [
        {"lr": 1e-2},
        {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.5},
        {"lr": 1e-2, "maximize": True, "eps": 1e-6},
    ],
    "adam": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.01, "betas": (0.8, 0.95), "eps": 1e-6},
        {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.01},
        {"lr": 1e-2, "maximize": True, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ],
    "adamw": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
        {"lr": 1e-2, "maximize": True, "weight_decay": 0.3},
        {"lr": 1e-2, "betas": (0.0, 0.9)},
        {"lr": 1e-2, "betas": (0.9, 0.9), "amsgrad": True},
    ],
    "lamb": [
        {"lr": 1e-3},
        {"lr": 1e-3, "maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-8},
        {"lr": 1e-3, "weight_decay": 0.0},
    ],
    "lars": [
        {"lr": 1e-1, "trust": 0.02},
        {"lr": 1e-1, "maximize": True, "weight_decay": 0.1, "trust": 0.01, "nesterov": True},
        {"lr": 1e-2, "momentum": 0.0, "trust": 0.5},
    ],
    "lion": [
        {"lr": 1e-2},
        {"lr": 1e-2, "maximize": True, "weight_decay": 0.3, "betas": (0.95, 0.98)},
    ],
    "muon": [
        {"lr": 1e-2, "momentum": 0.5},
        {"lr": 1e-2, "momentum": 0.8, "nesterov": False, "maximize": True, "adamw_lr": 2e-2},
        {"lr": 1e-3, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    ],
    "schedule_free_adamw": [
        {"lr": 1e-2},
        {"lr": 1e-2, "warmup_steps": 20, "weight_decay": 0.1, "r": 1.0, "betas": (0.8, 0.95)},
        {"lr": 1e-2, "maximize": True, "warmup_steps": 3, "weight_lr_power": 0.0},
    ],
    "sgd": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
        {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3},
        {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
}

EPSILON = 2.0**-24  # half a unit in the last place of float32, relative: the error of one rounding


# Rules that step any part of a parameter by itself, and those that step every stored form.
ELEMENTWISE = [name for name in OPTIMIZERS if optimizer_class(name).elementwise]
WITH_FORMS = [name for name in OPTIMIZERS if name not in {"adafactor", "muon"}]


def every_variant() -> list[Any]:
    """(name, hyper-parameters) of every registered optimizer; a new one without variants fails here."""
    return [
        pytest.param(name, variant, id=f"{name}-{number}")
        for name in OPTIMIZERS
        for number, variant in enumerate(VARIANTS[name])
    ]


def elementwise_variants() -> list[Any]:
    """Those of the rules that work element by element, wherever a parameter is cut."""
    return [param for param in every_variant() if optimizer_class(param.values[0]).elementwise]


def shardable_variants() -> list[Any]:
    """Those of the rules that step any part of a parameter by itself."""
    return [param for param in every_variant() if optimizer_class(param.values[0]).shardable]


def make(name: str, params: Any, variant: dict[str, Any]) -> NativeOptimizer:
    return optimizer_class(name)(params, **variant)  # type: ignore[call-arg]


def error_bound(
    name: str, group: dict[str, Any], *, steps: int, smallest: float, largest: float, parameter: float
) -> float:
    """How far float32 may drift from float64 in `steps` steps on gradients given from outside.

    `smallest <= |gradient| <= largest` and `|parameter|` bound the data; e is EPSILON. Each step adds the
    error of its update, which the rule's function below derives in units of e, and of rounding the parameter;
    earlier errors of p are carried on. Decoupled decay shrinks them. Coupled decay returns them to the
    gradient, which at most doubles them here: in SGD since steps * lr * decay / (1 - momentum) < ln 2, in
    Adam and Adagrad since d(update)/d(gradient) < 2 R / g for R, g below, and steps * lr * decay * 2 R / g <
    ln 2.
    """
    return steps * EPSILON * UPDATE_ERRORS[name](group, steps, smallest, largest, parameter)


def error_bounds(name: str, optimizer: NativeOptimizer, params: list[Any], **data: Any) -> list[float]:
    """The bound of each parameter's own group."""
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    return [error_bound(name, groups[parameter], **data) for parameter in params]


def _adamw(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """m and v are weighted means. Each step of m rounds three times: m is off by at most 3 e G / (1 - beta1)
    of its weight, and rounding the constant beta1 adds e G beta1 / (1 - beta1); dividing by the bias
    correction cancels the missing weight. v is a sum of positive terms, so its relative error is at most (3 +
    2) e a step of age, half of that after the root. With sqrt(v) >= g: the ratio m/sqrt(v) is off by at most
    R (4 / (1 - beta1) + 2.5 steps + 8) e, R = G / g, where 8 covers the scalars, root, product, sum, quotient
    and products of the update itself. The parameter is rounded twice.
    """
    update = largest / smallest * (4 / (1 - group["betas"][0]) + 2.5 * steps + 8)
    return float(group["lr"]) * update + 2 * parameter


def _adam(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """As AdamW, of the gradient with its decay term, which is rounded twice more."""
    if group["decoupled_weight_decay"]:
        return _adamw(group, steps, smallest, largest, parameter)
    pull = group["weight_decay"] * parameter
    assert pull < smallest
    return 2 * (1 + _adamw(group, steps + 1, smallest - pull, largest + pull, parameter))


def _adagrad(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """The sum's terms are positive: its relative error is at most (1 + 2) e a step, half of that after the
    root; the ratio is at most 1, and 8 covers the decay term, root, sum, quotient, product and scalars.
    """
    return 2 * (group["lr"] * (1.5 * steps + 8) + 2 * parameter)


def _adafactor(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """Means are of positive terms: each step rounds them three times, so the variance, their product, is off
    by at most (6 steps + 6) e of itself and the update by half of that and 10 e for its own operations. A
    mean lies in [g^2, G^2], so |update| <= R^2, times lr |p|. The step size carries p's own error on: in the
    root mean square by a factor of 1 + lr a step, e^(lr steps) <= e in all, which lr R^2 a step gives to an
    element.
    """
    ratio = (largest / smallest) ** 2
    own = group["lr"] * parameter * ratio * (3 * steps + 13) + 2 * parameter
    return float(own * (1 + steps * group["lr"] * ratio * 2.72))


def _muon(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """The momentum is off by at most (4 / (1 - m) + 6) e G, of a matrix whose root mean square is at least (1
    - m) g for these data. The quintic's slope is at most 3.45 in [0, 1.1], so k rounds amplify what enters by
    3.45^k; each of them rounds sums of up to 64 products of entries below 1.2 three times, in e 3 * 64 *
    1.2^5 of the norm, sqrt(3) for at most 3 rows. The update is lr times the ratio times that; p is rounded
    twice.
    """
    if not group["use_muon"]:
        return _adamw(group, steps, smallest, largest, parameter)
    slope, rest = 3.45, 1 - group["momentum"]
    entering = (4 / rest + 6) * largest / (rest * smallest) * slope ** group["ns_steps"]
    rounded = 3 * 64 * 1.2**5 * sum(slope**k for k in range(group["ns_steps"])) * 3**0.5
    ratio = 0.2 * 8 if group["adjust_lr_fn"] == "match_rms_adamw" else (64 / 3) ** 0.5
    return float(group["lr"] * ratio * (entering + rounded) + 2 * parameter)


def _lamb(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """The ratio as AdamW's, an element of at most R + decay |p|; the trust ratio is at most |p| / (g / G),
    for the update's root mean square is at least 1 / R of one gradient's when no decay opposes it, and it is
    off by the relative error of the norms, which are in double: those of p and u themselves. Errors of p
    return through both, in the root mean square by lr (1 + R) a step, e^(steps lr (1 + R)) < 2 in all.
    """
    ratio = largest / smallest
    trust = 1.0 if group["exclude"] else parameter * ratio / (1 - group["betas"][0])
    error = ratio * (4 / (1 - group["betas"][0]) + 2.5 * steps + 8) + 6 * group["weight_decay"] * parameter
    return float(2 * (2 * group["lr"] * trust * error + 2 * parameter))


def _lars(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """A step is the rate, at most lr trust |p| / g of a tensor's root mean squares, times G + decay |p|,
    rounded eight times; the buffer holds 1 / (1 - m) of them, each rounded twice more, and so does Nesterov.
    An error of p returns through the rate: lr trust (G / g + decay |p|) / (1 - m) a step, at most doubling it
    here.
    """
    rate = group["lr"] * (1.0 if group["exclude"] else max(1.0, group["trust"] * parameter / smallest))
    step = rate * (largest + group["weight_decay"] * parameter)
    return float(2 * (2 * 10 * step / (1 - group["momentum"]) ** 2 + 2 * parameter))


def _lion(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """The step is lr, rounded once; decay's constant and product and the sum round p three times. Elements
    whose sign is undecided are another matter: see `lion_may_flip`.
    """
    return float(group["lr"]) + 3 * parameter


def lion_may_flip(group: dict[str, Any], mixed: torch.Tensor, largest: float) -> torch.Tensor:
    """Where rounding may choose another sign than float64, which moves the parameter by up to 2 lr.

    The momentum rounds three times a step and remembers 1 / (1 - beta2) of them; the mixture rounds thrice.
    """
    return mixed.abs() <= (4 / (1 - group["betas"][1]) + 4) * largest * EPSILON


def _schedule_free(
    group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float
) -> float:
    """v as AdamW's, so the ratio g/sqrt(v) is at most R and off by R (2.5 steps + 8) e; decay adds 4 e decay
    |p|. The new y is a mean of y and z less a step, so their errors are not amplified. z rounds once a step,
    y four times; |z| and |y| are at most 2 |p|, with p the larger. Through decay y's error returns to z, at
    most doubling it, since steps * lr * decay < ln 2.
    """
    update = largest / smallest * (2.5 * steps + 8) + 4 * group["weight_decay"] * parameter
    return 2 * (2 * group["lr"] * update + (2 + 2 * 4) * parameter)


def _sgd(group: dict[str, Any], steps: int, smallest: float, largest: float, parameter: float) -> float:
    """g' = g + decay p, |g'| <= G'; the buffer is at most G' / (1 - momentum) and each step rounds it four
    times, so it is off by 4 e G' / (1 - momentum)^2, and Nesterov adds as much once more.
    """
    decayed = largest + group["weight_decay"] * parameter
    update = 2 * 4 * decayed / (1 - group["momentum"]) ** 2
    return 2 * (group["lr"] * update + 2 * parameter)


UPDATE_ERRORS: dict[str, Callable[[dict[str, Any], int, float, float, float], float]] = {
    "adafactor": _adafactor,
    "adagrad": _adagrad,
    "adam": _adam,
    "adamw": _adamw,
    "lamb": _lamb,
    "lars": _lars,
    "lion": _lion,
    "muon": _muon,
    "schedule_free_adamw": _schedule_free,
    "sgd": _sgd,
}


def gradients_for(
    shape: tuple[int, ...],
    steps: int,
    seed: int,
    smallest: float = 0.5,
    largest: float = 2.0,
) -> list[torch.Tensor]:
    """Random signs, magnitudes in [smallest, largest]: what error_bound supposes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(shape, generator=generator) * (largest - smallest) + smallest)
        * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
        for _ in range(steps)
    ]
