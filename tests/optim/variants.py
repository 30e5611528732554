"""Hyper-parameters under which each registered optimizer is tested, torch counterparts, error bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlsys_engine.optim import OPTIMIZERS, NativeOptimizer, optimizer_class

TORCH_PEERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adamw": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
        {"lr": 1e-2, "maximize": True, "weight_decay": 0.3},
        {"lr": 1e-2, "betas": (0.0, 0.9)},
    ],
    "sgd": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
        {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3},
        {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
}

EPSILON = 2.0**-24  # half a unit in the last place of float32, relative: the error of one rounding


def every_variant() -> list[Any]:
    """(name, hyper-parameters) of every registered optimizer; a new one without variants fails here."""
    return [
        pytest.param(name, variant, id=f"{name}-{number}")
        for name in OPTIMIZERS
        for number, variant in enumerate(VARIANTS[name])
    ]


def make(name: str, params: Any, variant: dict[str, Any]) -> NativeOptimizer:
    return optimizer_class(name)(params, **variant)  # type: ignore[call-arg]


def make_peer(name: str, params: Any, variant: dict[str, Any], **options: Any) -> torch.optim.Optimizer:
    return TORCH_PEERS[name](params, **variant, **options)


def error_bound(
    name: str, group: dict[str, Any], *, steps: int, smallest: float, largest: float, parameter: float
) -> float:
    """How far float32 may drift from float64 in `steps` steps on gradients given from outside.

    `smallest <= |gradient| <= largest` and `|parameter|` bound the data; e is EPSILON. Each step adds the
    error of its update, u, and of rounding the parameter twice, 2 e |p|; earlier errors of p are carried on
    (decay shrinks them; through SGD's coupled decay they return to the gradient, at most doubling here, since
    steps * lr * decay / (1 - momentum) < ln 2).

    AdamW: m and v are weighted means. Each step of m rounds three times: m is off by at most
    3 e G / (1 - beta1) of its weight, and rounding the constant beta1 adds e G beta1 / (1 - beta1); dividing
    by the bias correction cancels the missing weight. v is a sum of positive terms, so its relative error is
    at most (3 + 2) e a step of age, half of that after the root. With sqrt(v) >= g: the ratio m/sqrt(v) is
    off by at most R (4 / (1 - beta1) + 2.5 steps + 8) e, R = G / g, where 8 covers the scalars, root,
    product, sum, quotient and products of the update itself.

    SGD: g' = g + decay p, |g'| <= G'; the buffer is at most G' / (1 - momentum) and each step rounds it four
    times, so it is off by 4 e G' / (1 - momentum)^2, and Nesterov adds as much once more.
    """
    lr = group["lr"]
    if name == "adamw":
        update = largest / smallest * (4 / (1 - group["betas"][0]) + 2.5 * steps + 8)
        return steps * EPSILON * (lr * update + 2 * parameter)
    decayed = largest + group["weight_decay"] * parameter
    update = 2 * 4 * decayed / (1 - group["momentum"]) ** 2
    return 2 * steps * EPSILON * (lr * update + 2 * parameter)


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
