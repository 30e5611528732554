"""Slow, obvious float64 versions of every native rule and of the norm's order, for tests.

Written from the papers and from torch's documentation, one step of one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from mlsys_engine.optim.kernels import CHUNK_ELEMENTS

State = MutableMapping[str, Any]
NORM_LANES = 32  # csrc/optim/sum_of_squares.cpp: WideChunkSum
NARROW_LANES, NARROW_RUN = 64, 32  # and NarrowChunkSum


def adamw(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2. Returns the new parameter; `state` is changed.

    With amsgrad the largest second moment so far is taken, before its correction, as torch does.
    """
    gradient = -gradient if group["maximize"] else gradient
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    step = state["step"] = state.get("step", 0) + 1
    first = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * gradient
    second = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * gradient**2
    first_unbiased = first / (1 - beta1**step)
    if group["amsgrad"]:
        second = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", second), second)
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


def adam(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """Kingma & Ba 2015, algorithm 1, on the gradient of the loss with its decay term added."""
    if group["decoupled_weight_decay"]:
        return adamw(parameter, gradient, state, group)
    gradient = -gradient if group["maximize"] else gradient
    coupled = gradient + group["weight_decay"] * parameter
    return adamw(parameter, coupled, state, {**group, "maximize": False, "weight_decay": 0.0})


def adagrad(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """Duchi, Hazan & Singer 2011, figure 1 (diagonal), with torch.optim.Adagrad's decays."""
    gradient = -gradient if group["maximize"] else gradient
    gradient = gradient + group["weight_decay"] * parameter
    step = state["step"] = state.get("step", 0) + 1
    total = state["sum"] = state.get("sum", group["initial_accumulator_value"]) + gradient**2
    rate = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
    return parameter - rate * gradient / (total.sqrt() + group["eps"])


def adafactor(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """Shazeer & Stern 2018, algorithms 4 and 5, as torch.optim.Adafactor documents them."""
    if parameter.numel() == 0:  # whose means are of nothing
        state.update(step=state.get("step", 0) + 1, variance=gradient)
        return parameter
    gradient = -gradient if group["maximize"] else gradient
    eps1 = torch.finfo(torch.float32).eps if group["eps"][0] is None else group["eps"][0]
    lr = float(group["lr"])
    step = state["step"] = state.get("step", 0) + 1
    take = step ** group["beta2_decay"]

    def moved(name: str, sample: Tensor) -> Tensor:
        mean = state.get(name, torch.zeros_like(sample))
        state[name] = mean + take * (sample - mean)
        moment: Tensor = state[name]
        return moment

    if gradient.ndim > 1:
        rows = moved("row_var", gradient.square().mean(-1, keepdim=True))
        columns = moved("col_var", gradient.square().mean(-2, keepdim=True))
        variance = rows * columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        variance = moved("variance", gradient.square())
    update = gradient / variance.clamp(min=eps1**2).sqrt()
    size = max(group["eps"][1], parameter.square().mean().sqrt().item()) * min(lr, step**-0.5)
    clipped = max(1.0, update.square().mean().sqrt().item() / group["d"])
    return parameter * (1 - lr * group["weight_decay"]) - size / clipped * update


def lamb(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """You et al. 2020, algorithm 2; an excluded tensor steps without decay and without scaling."""
    gradient = -gradient if group["maximize"] else gradient
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    step = state["step"] = state.get("step", 0) + 1
    first = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * gradient
    second = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * gradient**2
    update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + group["eps"])
    if group["exclude"]:
        return parameter - lr * update
    update = update + group["weight_decay"] * parameter
    size, slope = parameter.norm(), update.norm()
    trust = size / slope if size != 0 and slope != 0 else 1.0
    return parameter - lr * trust * update


def lars(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """You, Gitman & Ginsburg 2017, algorithm 1; an excluded tensor takes momentum alone."""
    gradient = -gradient if group["maximize"] else gradient
    rate, momentum = float(group["lr"]), group["momentum"]
    decay = 0.0 if group["exclude"] else group["weight_decay"]
    size, slope = parameter.norm(), gradient.norm()
    if not group["exclude"] and size != 0 and slope != 0:
        rate = rate * group["trust"] * size / (slope + decay * size)
    step = rate * (gradient + decay * parameter if decay else gradient)
    buffer = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + step
    return parameter - (step + momentum * buffer if group["nesterov"] else buffer)


def lion(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """Chen et al. 2023, algorithm 2. `state["mixed"]` keeps what the last sign was taken of."""
    gradient = -gradient if group["maximize"] else gradient
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    momentum = state.get("exp_avg", 0.0)
    mixed = state["mixed"] = beta1 * momentum + (1 - beta1) * gradient
    state["exp_avg"] = beta2 * momentum + (1 - beta2) * gradient
    sign = mixed.sign().where(~mixed.isnan(), mixed)  # torch.sign makes zero of nan
    return parameter - lr * (sign + group["weight_decay"] * parameter)


def muon(parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]) -> Tensor:
    """Jordan et al. 2024 as torch.optim.Muon documents it, for a matrix; AdamW where the group says so."""
    if not group["use_muon"]:
        return adamw(parameter, gradient, state, {**group, "amsgrad": False})
    gradient = -gradient if group["maximize"] else gradient
    momentum, lr = group["momentum"], float(group["lr"])
    buffer = state.get("momentum_buffer", torch.zeros_like(gradient))
    buffer = state["momentum_buffer"] = momentum * buffer + (1 - momentum) * gradient
    x = momentum * buffer + (1 - momentum) * gradient if group["nesterov"] else buffer
    x = x.reshape(len(parameter), -1)
    rows, columns = x.shape
    x = x / x.norm().clamp(min=group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if group["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * max(rows, columns) ** 0.5
    else:
        ratio = max(1.0, rows / columns) ** 0.5
    return parameter * (1 - lr * group["weight_decay"]) - lr * ratio * x.reshape(parameter.shape)


def schedule_free_adamw(
    parameter: Tensor, gradient: Tensor, state: State, group: MutableMapping[str, Any]
) -> Tensor:
    """Defazio et al. 2024, algorithm 1 with its x, y and z all stored; returns y, where gradients are
    taken."""
    gradient = -gradient if group["maximize"] else gradient
    beta1, beta2 = group["betas"]
    step = state["step"] = state.get("step", 0) + 1
    z, x = state.get("z", parameter), state.get("x", parameter)
    second = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * gradient**2
    count = state["k"] = state.get("k", 0) + 1  # the group's steps; `step` are those with a gradient
    warm = min(1.0, count / group["warmup_steps"]) if group["warmup_steps"] else 1.0
    rate = float(group["lr"]) * warm
    largest = state["lr_max"] = max(state.get("lr_max", 0.0), rate)
    weight = count ** group["r"] * largest ** group["weight_lr_power"]
    total = state["weight_sum"] = state.get("weight_sum", 0.0) + weight
    root = (second / (1 - beta2**step)).sqrt() + group["eps"]
    z = state["z"] = z - rate * gradient / root - rate * group["weight_decay"] * parameter
    x = state["x"] = (1 - weight / total) * x + weight / total * z
    return (1 - beta1) * z + beta1 * x


REFERENCES: dict[str, Callable[[Tensor, Tensor, State, MutableMapping[str, Any]], Tensor]] = {
    "adafactor": adafactor,
    "adagrad": adagrad,
    "adam": adam,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
    "lion": lion,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
    "sgd": sgd,
}


def sum_of_squares(tensors: list[Tensor]) -> float:
    """The sum that the kernel must give bit for bit: chunks, lanes, a tree of lanes, then chunk by chunk."""
    return sum((_chunk_sum(chunk) for t in tensors for chunk in t.reshape(-1).split(CHUNK_ELEMENTS)), 0.0)


def _chunk_sum(chunk: Tensor) -> float:
    if chunk.dtype is not torch.float32:
        total = _narrow_chunk_sum(chunk.float())
        if 2.0**-90 <= total < math.inf:
            return total
    lanes = [0.0] * NORM_LANES
    for index, value in enumerate(chunk.double().square().tolist()):
        lanes[index % NORM_LANES] += value
    return _add_lanes(lanes)


def _narrow_chunk_sum(chunk: Tensor) -> float:
    """Runs of squares added in float32, lane by lane, then in float64; the tree begins with neighbours."""
    lanes = torch.zeros(NARROW_LANES, dtype=torch.float64)
    for run in chunk.square().split(NARROW_LANES * NARROW_RUN):
        total = torch.zeros(NARROW_LANES)
        for row in run.split(NARROW_LANES):
            total[: len(row)] += row
        lanes += total.double()
    return _add_lanes((lanes[0::2] + lanes[1::2]).tolist())


def _add_lanes(lanes: list[float]) -> float:
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    return lanes[0]
