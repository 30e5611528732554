"""Two ranks under DataParallel train the plain model's bits under every lossless policy."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlsys_engine import activation, optim, strategies
from tests.activation.test_budget import gpt, hugging_face, resnet

MODELS = {
    "gpt": gpt,
    "resnet": resnet,
    **{name: partial(hugging_face, name) for name in ("gpt2", "llama", "bert", "vit")},
}


def mean_square(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


def linked(names: list[str]) -> dict[str, str]:
    """Two blocks that are run again together, and the others alone, under different options."""
    first, second, *others = names
    return {
        first: "recompute with selective",
        second: f"recompute linked after K {first}",
        **dict.fromkeys(others, "recompute with offload"),
    }


def choices_of(model: nn.Module, sample: Any, loss: Any) -> dict[str, dict[str, str]]:
    names = list(activation.resolve(model, "full"))
    call = None if loss is None else (lambda model, sample: loss(model(sample), sample))
    return {
        "plain": {},
        "full": dict.fromkeys(names, "recompute"),
        "selective": dict.fromkeys(names, "selective"),
        "offload": dict.fromkeys(names, "selective-offload"),
        "linked": linked(names),
        "budget": dict(activation.plan(model, sample, 0.5, call=call, repeats=0).actions),
    }


def _train(rank: int, world_size: int) -> dict[str, list[str]]:
    differing: dict[str, list[str]] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, sample = make()
        loss = mean_square if isinstance(sample, Tensor) else None
        states: dict[str, dict[str, Any]] = {}
        for choice, actions in choices_of(model, sample, loss).items():
            torch.manual_seed(rank)
            own = activation.apply_actions(copy.deepcopy(model), actions)
            runner = strategies.wrap(own, optimizer=partial(optim.AdamW, lr=1e-2), loss=loss, sample=sample)
            losses = [runner.step([sample]).loss for _ in range(2)]
            state = {key: value.clone() for key, value in own.state_dict().items()}
            states[choice] = {**state, "loss": torch.stack(losses)}
            runner.close()
        for choice, state in states.items():
            for key, value in states["plain"].items():
                if not torch.equal(value, state[key]):
                    differing.setdefault(f"{name}, {choice}", []).append(key)
    return differing


def test_two_ranks_train_the_plain_models_bits_under_every_lossless_policy(run_ranks: Any) -> None:
    assert run_ranks(_train, 2) == [{}, {}]
