"""Slow, obvious float64 versions of every native rule and of the norm's order, for tests.

Written from the papers and from torch's documentation, one step of one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor

from mlsys_engine.optim.kernels import CHUNK_ELEMENTS

State = MutableMapping[str, Any]
NORM_LANES = 32  # csrc/optim/sum_of_squares.cpp: kLanes


def adamw(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2. Returns the new parameter; `state` is changed."""
    gradient = -gradient if group["maximize"] else gradient
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    step = state["step"] = state.get("step", 0) + 1
    first = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * gradient
    second = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * gradient**2
    first_unbiased = first / (1 - beta1**step)
    second_unbiased = second / (1 - beta2**step)
    decayed = parameter - lr * group["weight_decay"] * parameter
    return decayed - lr * first_unbiased / (second_unbiased.sqrt() + group["eps"])


def sgd(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """torch.optim.SGD's documented algorithm. Returns the new parameter; `state` is changed."""
    gradient = -gradient if group["maximize"] else gradient
    gradient = gradient + group["weight_decay"] * parameter
    if group["momentum"] != 0:
        if "momentum_buffer" not in state:
            buffer = gradient.clone()
        else:
            buffer = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * gradient
        state["momentum_buffer"] = buffer
        gradient = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
    return parameter - float(group["lr"]) * gradient


REFERENCES: dict[str, Callable[[Tensor, Tensor, State, MutableMapping[str, Any]], Tensor]] = {
    "adamw": adamw,
    "sgd": sgd,
}


def sum_of_squares(tensors: list[Tensor]) -> float:
    """The sum that the kernel must give bit for bit: chunks, lanes, a tree of lanes, then chunk by chunk."""
    total = 0.0
    for tensor in tensors:
        for chunk in tensor.reshape(-1).double().square().split(CHUNK_ELEMENTS):
            lanes = [0.0] * NORM_LANES
            for index, value in enumerate(chunk.tolist()):
                lanes[index % NORM_LANES] += value
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[i] + lanes[i + half] for i in range(half)]
            total += lanes[0]
    return total
