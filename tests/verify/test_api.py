from __future__ import annotations

import os
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import mlsys_engine as mls
from mlsys_engine.errors import ConfigError, DataError, InternalError, LaunchError
from mlsys_engine.verify import Verdict, verify
from tests.support.ranks import run_ranks
from tests.verify.subjects import Net, mlp, pairs, plan_of, squared_error


class Stateful(nn.Module):
    """Counts the calls of all its copies, so no two steps are alike."""

    calls: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return self.layer(inputs) * self.calls[0]


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) + torch.rand(1, generator=_GENERATOR, dtype=torch.float64)


_GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": mls.DataParallel()}, "mls.plan(model, strategy, sample, world=2)"),
        ({"model": "Net"}, "given a str as the model"),
        ({"model": mlp()}, "The plan has no trainable 0.bias and the model has 0.bias of shape (8,)"),
        ({"model": Net().to("meta")}, "first.weight is on the meta device"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"tolerance": float("inf")}, "tolerance=inf"),
        ({"tolerance": 0.0}, "a finite number above 0"),
        ({"precision": "fp32"}, "precision='fp32'"),
        ({"plan": plan_of(Net(), world=65)}, "would start 65 ranks on this machine"),
        ({"batch": [pairs(2)] * 3}, "a list of 3 microbatches"),
        ({"batch": (pairs(4)[0] * torch.nan, pairs(4)[1])}, "loss on this batch is nan"),
        ({"optimizer": mls.optim.AdamW}, "In float64 the optimizer says: first.weight is float64"),
        ({"loss": lambda output, batch: (output.sum(), 0)}, "counts nothing"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_rank_is_started(change: Any, words: str) -> None:
    settings = {"model": Net(), "plan": plan_of(Net()), "batch": pairs(), "loss": squared_error} | change
    with pytest.raises(ConfigError) as caught:
        verify(settings.pop("model"), settings.pop("plan"), settings.pop("batch"), **settings)
    assert words in str(caught.value)
    assert caught.value.expected and caught.value.action


def test_a_batch_with_tensors_of_unequal_length_is_refused() -> None:
    inputs, targets = pairs()
    with pytest.raises(DataError, match="A batch of 12 samples"):
        verify(Net(), plan_of(Net()), (inputs, targets[:5]), loss=squared_error)


def _on_own_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """In a process that may fork: it has run no parallel region."""
    torch.set_num_threads(1)

    class Local(nn.Linear):  # has no importable name
        pass

    model = nn.Sequential(Local(6, 4), nn.Dropout(0.5), Local(4, 1))
    own_loss = lambda output, batch: squared_error(output, batch) * 2  # noqa: E731 (no importable name)
    said: dict[str, Any] = {"local class": verify(model, plan_of(model), pairs(), loss=own_loss)}
    two = [pairs(3), pairs(4)]
    said["microbatches"] = verify(mlp(), plan_of(mlp()), two, loss=squared_error)
    said["as loaders yield"] = verify(mlp(), plan_of(mlp()), list(pairs()), loss=squared_error)
    subject, divided = mlp(), mls.PipelineParallel(2, split=("3",))
    try:
        verify(subject, plan_of(subject, strategy=divided), pairs(), loss=_raises_on_rank_1, timeout_s=30.0)
    except Exception as error:
        said["bug in a stage"] = error
    for name, subject, loss, settings in (
        ("own generator", OwnGenerator(), squared_error, {}),
        ("state", Stateful(), squared_error, {}),
        ("mistake", mlp(), _mistaken_on_rank_1, {}),
        ("bug", mlp(), _raises_on_rank_1, {}),
        ("death", mlp(), _dies_on_rank_1, {}),
        ("too slow", mlp(), _sleeps_on_rank_1, {"timeout_s": 1.0}),
    ):
        try:
            said[name] = verify(subject, plan_of(subject), pairs(), loss=loss, **settings)
        except Exception as error:
            said[name] = error
    return said


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _mistaken_on_rank_1(output: torch.Tensor, batch: Any) -> Any:
    return squared_error(output, batch) if _rank() == 0 else "no number"


def _raises_on_rank_1(output: torch.Tensor, batch: Any) -> Any:
    if _rank() == 1:
        raise ZeroDivisionError("of rank 1")
    return squared_error(output, batch)


def _dies_on_rank_1(output: torch.Tensor, batch: Any) -> Any:
    if _rank() == 1:
        os._exit(3)
    return squared_error(output, batch)


def _sleeps_on_rank_1(output: torch.Tensor, batch: Any) -> Any:
    if _rank() == 1:
        torch.distributed.distributed_c10d._get_default_store().wait(["never"])
    return squared_error(output, batch)


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    return run_ranks(_on_own_ranks, 1, init=False)[0]


def test_outside_a_job_it_starts_the_ranks_itself_whatever_the_model_is(said: dict[str, Any]) -> None:
    for name in ("local class", "microbatches", "as loaders yield"):
        assert isinstance(said[name], Verdict) and said[name].ok, str(said[name])


@pytest.mark.parametrize("name", ["own generator", "state"])
def test_a_model_that_is_not_deterministic_is_told_from_a_wrong_plan(said: dict[str, Any], name: str) -> None:
    assert isinstance(said[name], ConfigError)
    assert "Two steps of the unsharded model differ: the output of the model" in str(said[name])


def test_a_rank_that_fails_is_named_with_its_own_words(said: dict[str, Any]) -> None:
    assert isinstance(said["mistake"], ConfigError)
    assert "On rank 1: The loss function returned a str" in str(said["mistake"])
    assert isinstance(said["bug"], InternalError) and "ZeroDivisionError: of rank 1" in str(said["bug"])
    assert isinstance(said["bug in a stage"], InternalError), str(said["bug in a stage"])
    assert "ZeroDivisionError: of rank 1" in str(said["bug in a stage"])
    assert isinstance(said["death"], LaunchError) and "Rank 1 of verify died" in str(said["death"])
    assert isinstance(said["too slow"], LaunchError)
    assert "has not answered in 1 s" in str(said["too slow"])


def _in_another_job(rank: int, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        verify(mlp(), plan_of(mlp(), world=4), pairs(), loss=squared_error)
    return str(caught.value)


def test_a_plan_for_another_world_is_refused_in_a_job() -> None:
    assert "a plan for 4 ranks in a job of 2" in run_ranks(_in_another_job, 2)[0]
