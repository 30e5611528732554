from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import mlsys_engine as mls
from mlsys_engine.data_parallel import forward as forward_module
from mlsys_engine.data_parallel import runner as runner_module
from mlsys_engine.data_parallel.accumulation import InOrder
from mlsys_engine.data_parallel.buffers import BufferSync
from mlsys_engine.data_parallel.reductions import PlainReduction
from mlsys_engine.data_parallel.update import PlainUpdate
from mlsys_engine.verify import Verdict
from tests.support.ranks import run_ranks
from tests.verify.subjects import Net, mlp, verdict_of

_SUM = PlainReduction.__call__


class _Done:
    def __init__(self, work: Any = None, bucket: Any = None) -> None:
        self._work, self._bucket = work, bucket

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._bucket.gradients.mul_(0.5)


def _mean(self: PlainReduction, bucket: Any) -> _Done:
    return _Done(_SUM(self, bucket), bucket)


def _all_but_the_first(self: PlainReduction, bucket: Any) -> Any:
    return _Done() if bucket.index == 0 else _SUM(self, bucket)


def _thaws(self: PlainUpdate, scale: Any) -> None:
    _STEP(self, scale)
    model = _models[-1]
    with torch.no_grad():
        model.first.bias.add_(1e-3)


def _forgets_one(self: PlainUpdate, scale: Any) -> None:
    weight = _models[-1].last.weight
    before = weight.detach().clone()
    _STEP(self, scale)
    with torch.no_grad():
        weight.copy_(before)


def _rank_1_scales_its_inputs(model: Any, batch: Any, with_loss: bool) -> Any:
    batch = (batch[0] * (1.0 + 1e-6 * torch.distributed.get_rank()), *batch[1:])
    return _CALL(model, batch, with_loss=with_loss)


def _drops_a_microbatch(self: InOrder, batches: Any, *rest: Any) -> Any:
    return _RUN(self, batches[: 1 + torch.distributed.get_rank()], *rest)


_STEP, _CALL, _RUN = PlainUpdate.step, forward_module.call_model, InOrder.run
_INIT = runner_module.DataParallelRunner.__init__
_models: list[Any] = []


def _remember(self: Any, **parts: Any) -> None:
    _models.append(parts["model"])
    _INIT(self, **parts)


_FAULTS: dict[str, Any] = {
    "mean for a sum": (PlainReduction, "__call__", _mean),
    "bucket left out": (PlainReduction, "__call__", _all_but_the_first),
    "frozen parameter changed": (PlainUpdate, "step", _thaws),
    "parameter not stepped": (PlainUpdate, "step", _forgets_one),
    "other inputs on one rank": (forward_module, "call_model", _rank_1_scales_its_inputs),
    "microbatch lost": (InOrder, "run", _drops_a_microbatch),
    "running statistics of every rank its own": (BufferSync, "_send", lambda self, tensors: None),
}


def _with_faults(rank: int, world_size: int) -> dict[str, Verdict]:
    verdicts = {}
    for name, (owner, attribute, fault) in _FAULTS.items():
        with (
            mock.patch.object(owner, attribute, fault),
            mock.patch.object(runner_module.DataParallelRunner, "__init__", _remember),
        ):
            verdicts[name] = verdict_of(accumulate=2)
    return verdicts


@pytest.fixture(scope="module")
def faults() -> dict[str, Verdict]:
    """Verdicts by fault, of a job's second rank."""
    return run_ranks(_with_faults, 2)[1]


@pytest.mark.parametrize(
    ("fault", "kind", "name", "cause"),
    [
        ("mean for a sum", "gradient", "last.bias", "1/2 of what it should be: divided by the 2 data ranks"),
        ("bucket left out", "gradient", "last.bias", "bucket 0 differs, all of it and nothing else"),
        ("frozen parameter changed", "parameter", "first.bias", "frozen, and was changed"),
        ("parameter not stepped", "parameter", "last.weight", "gradient is right, but it was not stepped"),
        ("other inputs on one rank", "output", "first", "before anything is summed over ranks"),
        ("microbatch lost", "total", "num_tokens", ""),
        ("running statistics of every rank its own", "buffer", "norm.running_mean", ""),
    ],
)
def test_a_fault_is_found_and_its_place_is_named(
    faults: dict[str, Verdict], fault: str, kind: str, name: str, cause: str
) -> None:
    verdict = faults[fault]
    assert not verdict.ok and verdict.culprit is not None, str(verdict)
    assert (verdict.culprit.kind, verdict.culprit.name) == (kind, name), str(verdict)
    assert cause in verdict.culprit.cause, str(verdict)
    assert verdict.culprit.relative > verdict.tolerance == 1e-10


def _every_option(rank: int, world_size: int) -> dict[str, Verdict]:
    return {
        "plain": verdict_of(),
        "ragged": verdict_of(num_samples=9, accumulate=2),
        "few": verdict_of(mlp(), num_samples=1),
        "clipped": verdict_of(max_grad_norm=1e-3),
        "types of the model": verdict_of(precision="model"),
        "bf16 in float64": verdict_of(mode="bf16"),
        "bf16": verdict_of(mode="bf16", precision="model"),
        "world-invariant": verdict_of(mlp(), numerics="world_invariant", seed=4),
        "sharded": verdict_of(strategy=mls.DataParallel(shard="optimizer")),
        "compressed": verdict_of(strategy=mls.DataParallel(compression="powersgd")),
    }


@pytest.fixture(scope="module")
def options() -> dict[str, Verdict]:
    verdicts = run_ranks(_every_option, 2)
    assert {name: str(verdict) for name, verdict in verdicts[0].items()} == {
        name: str(verdict) for name, verdict in verdicts[1].items()
    }, "every rank of a job has the same verdict"
    return verdicts[0]


def test_every_way_of_data_parallelism_takes_the_step_of_one_process(options: dict[str, Verdict]) -> None:
    assert {name: verdict.line for name, verdict in options.items() if not verdict.ok} == {}
    assert options["plain"].compared == {
        "output": 5, "gradient": 5, "total": 3, "parameter": 8, "buffer": 3,
    }  # fmt: skip


def test_dropout_draws_the_numbers_of_the_plans_ranks(options: dict[str, Verdict]) -> None:
    # Net drops 3 of 10 values: other numbers would change its loss in the first digit.
    assert options["plain"].loss == pytest.approx(options["plain"].plan_loss, rel=1e-13)
    assert options["plain"].largest < 1e-13


def test_the_tolerance_of_narrow_types_is_measured_on_the_unsharded_model(
    options: dict[str, Verdict],
) -> None:
    narrow, wide = options["bf16"].tolerance, options["types of the model"].tolerance
    assert 64 * torch.finfo(torch.float32).eps <= wide < 1e-3 < narrow
    assert "own rounding" in options["bf16"].tolerance_reason


def test_what_was_left_out_is_said(options: dict[str, Verdict]) -> None:
    said = {name: " ".join(verdict.notes) for name, verdict in options.items()}
    assert "2 trainable parameters got no gradient in one process (unused.weight, ...)" in said["plain"]
    assert "does not divide by 4" in said["ragged"]
    assert "1 of 2 microbatches" in said["few"]
    assert "bf16 was replaced by float64" in said["bf16 in float64"]
    assert "the updates were compared instead" in said["sharded"]
    assert "compression 'powersgd' was left out" in said["compressed"]


def _keeps_everything(rank: int, world_size: int) -> None:
    model = Net()
    model.last.weight.grad = torch.ones_like(model.last.weight)
    torch.manual_seed(7)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert verdict_of(model).ok
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() is torch.float32


def test_the_model_its_gradients_and_the_random_state_are_left_alone() -> None:
    run_ranks(_keeps_everything, 2)
