"""The first real step of a training, compared with the same step of the unsharded model before it goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.comm.launch import World
from mlsys_engine.data_parallel.state import load_model_state
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import Loss, to_device
from mlsys_engine.plan import Plan, Runner, StepResult
from mlsys_engine.verify.checks import check_repeatable
from mlsys_engine.verify.compare import compare
from mlsys_engine.verify.observe import OutputRecorder
from mlsys_engine.verify.planned import RankReport, report
from mlsys_engine.verify.randomness import Generators
from mlsys_engine.verify.serial import OptimizerFactory, StepInputs, run_serial
from mlsys_engine.verify.tolerances import measured
from mlsys_engine.verify.verdict import Verdict


class FirstStep:
    """Takes a runner's step as `Runner.step` does, and gives a verdict on it.

    Made before the plan is applied, because it keeps a copy of the unsharded `model`. Every rank computes the
    whole global batch once more in one process, and once in float64 for the tolerance: it costs that time,
    and the memory of the whole model, its gradients and its optimizer's state, on every rank. Raises
    ConfigError for a plan whose step is not meant to be that of the unsharded model.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        loss: Loss | None,
        optimizer: OptimizerFactory,
        max_grad_norm: float | None,
    ) -> None:
        if plan.compression is not None:
            raise ConfigError(
                f'verify="first_step" with compression={plan.compression!r}.',
                "Compression changes gradients on purpose, which no comparison tells from a mistake.",
                "Leave one of them out; mls.verify(model, plan, batch) proves the plan without it.",
            )
        self._twin, self._plan = copy.deepcopy(model), plan
        self._loss, self._optimizer, self._max_grad_norm = loss, optimizer, max_grad_norm

    def step(self, runner: Runner, batches: Sequence[Any], world: World) -> tuple[StepResult, Verdict | None]:
        """One step of the runner and, unless it was skipped, the verdict on it, the same on every rank.

        Every rank calls it. The runner, and the state of the random generators, are then as after its step.
        """
        device = world.device
        state = runner.state_dict(full=True)
        shards, generators = _gathered_inputs(runner, batches, device)
        recorder = OutputRecorder(nn.Module() if self._plan.compile else runner.model)
        recorder.shard = runner.data_rank
        try:
            result = runner.step(batches)
        finally:
            recorder.close()
        if result.skipped:
            return result, None
        after = Generators.now(device)
        try:
            inputs = self._inputs(shards, generators, state, result, device)
            return result, self._verdict(runner, result, recorder, inputs, state)
        finally:
            after.restore(device)

    def _inputs(
        self,
        shards: Sequence[Sequence[Any]],
        generators: Sequence[Generators],
        state: Mapping[str, Any],
        result: StepResult,
        device: torch.device,
    ) -> StepInputs:
        return StepInputs(
            shards=shards,
            seed_shard=lambda shard: generators[shard].restore(device),
            loss=self._loss,
            optimizer=self._optimizer,
            max_grad_norm=self._max_grad_norm,
            optimizer_state=state["optimizer"],
            loss_scale=float(result.measured.get("loss_scale", 1.0)),
            step=state.get("accumulation", {}).get("num_steps", 0),
        )

    def _verdict(
        self,
        runner: Runner,
        result: StepResult,
        recorder: OutputRecorder,
        inputs: StepInputs,
        state: Mapping[str, Any],
    ) -> Verdict:
        device = result.loss.device
        load_model_state(self._twin, state["model"])
        start = self._twin.to(device)
        modes = {name: module.training for name, module in runner.model.named_modules()}
        for name, module in start.named_modules():
            module.training = modes.get(name, runner.model.training)
        reference = run_serial(self._plan, copy.deepcopy(start), inputs)
        tolerance = measured(self._plan, start, inputs, reference)
        own = report(
            self._plan,
            runner=runner,
            result=result,
            recorder=recorder,
            reference=reference,
            tolerance=tolerance.value,
        )
        ranks: list[RankReport] = [own] * self._plan.world_size
        if self._plan.world_size > 1:
            dist.all_gather_object(ranks, own)
        verdict = compare(self._plan, reference, ranks, tolerance, notes=())
        if not verdict.ok:
            check_repeatable(self._plan, start, inputs, reference, tolerance.value)
        return verdict


def _gathered_inputs(
    runner: Runner, batches: Sequence[Any], device: torch.device
) -> tuple[list[list[Any]], list[Generators]]:
    """Every data shard's microbatches and generators, on every rank."""
    here = (runner.data_rank, to_device(list(batches), torch.device("cpu")), Generators.now(device))
    everywhere = [here]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everywhere = [here] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
    by_shard = {shard: (given, generators) for shard, given, generators in reversed(everywhere)}
    ordered = [by_shard[shard] for shard in range(runner.num_data_shards)]
    return [given for given, _ in ordered], [generators for _, generators in ordered]
