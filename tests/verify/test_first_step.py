from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import mlsys_engine as mls
from mlsys_engine.data_parallel.reductions import PlainReduction
from mlsys_engine.data_parallel.update import FusedUpdate
from mlsys_engine.errors import ConfigError, VerificationError
from mlsys_engine.verify import FirstStep
from tests.support.ranks import run_ranks
from tests.trainer.workloads import Losses, make_loader, make_model, make_trainer
from tests.verify.subjects import Net, plan_of, squared_error

_STEP = FusedUpdate.step


class _Done:
    def wait(self) -> None:
        pass


def _reduces_nothing(self: PlainReduction, bucket: Any) -> _Done:
    return _Done()


def _steps_twice(self: FusedUpdate, scale: Any) -> None:
    _STEP(self, scale)
    _STEP(self, scale)


def _fit(run_dir: Path, *, steps: int = 3, **settings: Any) -> tuple[dict[int, float], str | None]:
    """Losses by step, and what was said against the first."""
    losses = Losses()
    trainer = make_trainer(run_dir, losses, **settings)
    try:
        trainer.fit(make_loader(), max_steps=steps, save_every=100)
    except VerificationError as error:
        return losses.by_step, str(error)
    return losses.by_step, None


_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 0.5, "accumulate": 2},
    "sharded": {"strategy": mls.DataParallel(shard="optimizer", bucket_mib=1e-4)},
    "scheduled": {
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "lr_schedule": lambda step: 0.1 / (step + 1),
    },
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "bf16-pure": {"precision": "bf16-pure"},
    "world-invariant": {"numerics": "world_invariant"},
    "checkpointed": {"activation": "full"},
    "pipeline": {"strategy": mls.PipelineParallel(2), "max_grad_norm": 0.5},
    "model": {"strategy": mls.ModelParallel(2), "max_grad_norm": 0.5},
    "model-fp16": {"strategy": mls.ModelParallel(2), "precision": "fp16"},
    "pipeline-bf16": {"strategy": mls.PipelineParallel(2, "zb-h1"), "precision": "bf16"},
}


_ALWAYS = ("plain", "sharded", "pipeline", "model")


class _Blocks(nn.Module):
    """The regression by blocks, for stages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make_model().layers for _ in range(2))
        self.blocks[0][3] = nn.Linear(16, 6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


def _plain_and_proved(rank: int, world_size: int, folder: str, name: str) -> Any:
    make = _Blocks if name.startswith("pipeline") else make_model
    settings = _KINDS[name]
    plain = _fit(Path(folder) / "plain", model=make(), **settings)
    return plain, _fit(Path(folder) / "proved", verify="first_step", model=make(), **settings)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("plain", "sharded", "pipeline", "model") else pytest.mark.soak
        )
        for name in _KINDS
    ],
)
def test_a_training_whose_first_step_is_proved_has_the_losses_of_one_that_is_not(
    tmp_path: Path, name: str
) -> None:
    for plain, proved in run_ranks(_plain_and_proved, 2, str(tmp_path), name):
        assert proved == plain and plain[1] is None
        assert sorted(plain[0]) == [1, 2, 3]


def _resumed(rank: int, world_size: int, folder: str) -> Any:
    """From the moments and the step of a training that was saved, and from other weights than its."""
    _fit(Path(folder), steps=2, **_KINDS["scheduled"])
    return _fit(Path(folder), steps=4, verify="first_step", model=make_model(seed=9), **_KINDS["scheduled"])


def test_the_first_step_of_a_resumed_training_is_compared_with_its_optimizer_state(tmp_path: Path) -> None:
    for losses, said in run_ranks(_resumed, 2, str(tmp_path)):
        assert said is None and sorted(losses) == [3, 4]


def _faults(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    with mock.patch.object(PlainReduction, "__call__", _reduces_nothing):
        unreduced = _fit(Path(folder) / "unreduced", verify="first_step")
        unproved = _fit(Path(folder) / "unproved")
    with mock.patch.object(FusedUpdate, "step", _steps_twice):
        twice = _fit(Path(folder) / "twice", verify="first_step")
    return {"unreduced": unreduced, "unproved": unproved, "twice": twice}


def test_it_raises_on_every_rank_before_the_training_goes_on(tmp_path: Path) -> None:
    for found in run_ranks(_faults, 2, str(tmp_path)):
        losses, said = found["unreduced"]
        assert losses == {} and said is not None
        assert "parts from the unsharded model at the gradient of layers.3.bias" in said
        assert "they were not summed over all ranks" in said
        losses, said = found["twice"]
        assert losses == {} and said is not None and "at the parameter of layers.0.weight" in said
        assert found["unproved"][1] is None and len(found["unproved"][0]) == 3


def test_compression_is_refused() -> None:
    plan = plan_of(Net(), strategy=mls.DataParallel(compression="powersgd"))
    with pytest.raises(ConfigError, match="compression='powersgd'"):
        FirstStep(Net(), plan, loss=squared_error, optimizer=torch.optim.SGD, max_grad_norm=None)


def _skips_then_proves(rank: int, world_size: int) -> list[bool | None]:
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    plan = plan_of(model)
    settings: dict[str, Any] = {"loss": squared_error, "optimizer": mls.optim.SGD, "max_grad_norm": None}
    settings["optimizer"] = partial(mls.optim.SGD, lr=0.1)
    verifier = FirstStep(model, plan, **settings)
    runner, world = mls.apply(plan, model, **settings), mls.init()
    inputs = torch.randn(4, 6)
    verdicts = []
    for scale in (float("inf"), 1.0):
        batch = (inputs * scale, torch.ones(4, 1))
        verdicts.append(verifier.step(runner, [batch], world)[1])
    runner.close()
    return [None if verdict is None else verdict.ok for verdict in verdicts]


def test_a_step_that_is_skipped_proves_nothing_and_the_next_is_compared() -> None:
    assert run_ranks(_skips_then_proves, 2) == [[None, True]] * 2
