from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import mlsys_engine as mls
from mlsys_engine.data_parallel import runner as runner_module
from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.pipeline.runtime import PipelineAccumulation
from mlsys_engine.pipeline.runtime import accumulation as accumulation_module
from mlsys_engine.pipeline.runtime.stage import Stage, _Inbox
from mlsys_engine.verify import Verdict
from tests.support.ranks import run_ranks
from tests.verify.subjects import text_verdict_of

_RECEIVE, _ROOTS, _WEIGHTS = _Inbox.receive, Stage._roots, Stage.weights
_PIECES, _OVER_PARTS = PipelineAccumulation._microbatches, runner_module.over_parts


def _rounds_what_crosses(self: _Inbox, skeleton: torch.Tensor) -> torch.Tensor:
    tensor = _RECEIVE(self, skeleton)
    with torch.no_grad():
        tensor.flatten()[0] += 1e-6
    return tensor


def _doubles_gradients_that_cross(self: Stage, held: Any, arrived: Any) -> Any:
    factor = 1.0 if arrived is None or not arrived.tensors else 2.0
    return [(root, gradient * factor) for root, gradient in _ROOTS(self, held, arrived)]


def _loses_a_weight_half(self: Stage, microbatch: int) -> None:
    if microbatch == 1:
        self._in_flight.pop(microbatch)
    else:
        _WEIGHTS(self, microbatch)


def _norm_of_own_stage(share: Any, loss_sum: Any, count: Any, squares: Any) -> Any:
    loss_sum, count, _ = _OVER_PARTS(share, loss_sum, count, squares)
    return loss_sum, count, squares


_FAULTS: dict[str, Any] = {
    "rounded message": (_Inbox, "receive", _rounds_what_crosses),
    "gradients twice": (Stage, "_roots", _doubles_gradients_that_cross),
    "weight half lost": (Stage, "weights", _loses_a_weight_half),
    "norm of one stage": (runner_module, "over_parts", _norm_of_own_stage),
    "microbatch lost": (PipelineAccumulation, "_microbatches", lambda *given: _PIECES(*given)[:-1]),
    "no seeds": (accumulation_module, "seed_microbatch", lambda base, microbatch: None),
}


def _with_faults(rank: int, world_size: int) -> dict[str, Verdict]:
    verdicts = {}
    for name, (owner, attribute, fault) in _FAULTS.items():
        schedule = "zb-h1" if name == "weight half lost" else "1f1b"
        with mock.patch.object(owner, attribute, fault):
            verdicts[name] = text_verdict_of(mls.PipelineParallel(2, schedule=schedule))
    return verdicts


@pytest.fixture(scope="module")
def faults() -> dict[str, Verdict]:
    return run_ranks(_with_faults, 2)[0]


@pytest.mark.parametrize(
    ("fault", "culprit", "where", "cause"),
    [
        ("rounded message", ("output", "blocks.3.0"), "stage 1", "look at what crosses into stage 1"),
        ("gradients twice", ("gradient", "blocks.2.1.bias"), "stage 0", "right: look at what crosses back"),
        ("norm of one stage", ("total", "grad_norm"), "", ""),
        ("microbatch lost", ("total", "num_tokens"), "", "samples were lost, or counted twice"),
        ("weight half lost", ("gradient", "blocks.3.1.bias"), "stage 1", ""),
        ("no seeds", ("output", "blocks.0.3"), "stage 0", ""),
    ],
)
def test_a_fault_is_found_and_its_stage_is_named(
    faults: dict[str, Verdict], fault: str, culprit: tuple[str, str], where: str, cause: str
) -> None:
    found = faults[fault].culprit
    assert found is not None and (found.kind, found.name) == culprit, str(faults[fault])
    assert where in found.where and cause in found.cause, str(faults[fault])


def _schedules(rank: int, world_size: int) -> dict[str, Verdict]:
    return {
        "1f1b": text_verdict_of(mls.PipelineParallel(2), rows=11, accumulate=2),
        "zb-v": text_verdict_of(mls.PipelineParallel(2, schedule="zb-v")),
        "model's types": text_verdict_of(mls.PipelineParallel(2, microbatches=3)),
    }


def test_pipelines_take_the_step_of_one_process() -> None:
    for verdicts in run_ranks(_schedules, 2):
        assert {name: verdict.line for name, verdict in verdicts.items() if not verdict.ok} == {}
        # Every parameter of both stages, once; a module that both compute for themselves is one, too.
        assert verdicts["1f1b"].compared["gradient"] == verdicts["1f1b"].compared["parameter"] == 17


def _unlaunched(self: Reducer, bucket: int) -> None:
    """Leaves a stage's gradients on their rank, as weight halves after the reduction would be."""
    self.num_launched += 1


def _hybrids(rank: int, world_size: int) -> dict[str, Verdict]:
    sharded = mls.HybridParallel(data=mls.DataParallel(shard="optimizer"), pipeline=2)
    both = mls.HybridParallel(data=2, pipeline=2)
    with mock.patch.object(Reducer, "launch", _unlaunched):
        unreduced = text_verdict_of(both, world=4)
    return {
        "replicated": text_verdict_of(both, world=4, rows=13, accumulate=2),
        "sharded": text_verdict_of(sharded, world=4),
        "unreduced": unreduced,
    }


def test_data_times_pipeline_takes_the_step_of_one_process_unless_it_is_not_reduced() -> None:
    verdicts = run_ranks(_hybrids, 4)[3]
    assert verdicts["replicated"].ok and verdicts["sharded"].ok, verdicts
    assert verdicts["replicated"].compared["gradient"] == 17
    culprit = verdicts["unreduced"].culprit
    assert culprit is not None and culprit.kind == "gradient"
    assert "they were not summed over all ranks" in culprit.cause, str(verdicts["unreduced"])
