"""Data parallelism: every rank has the whole model and its share of the batch.

A step: forward and backward of the loss SUM for each of this rank's microbatches; the reducer adds gradients
over ranks while the last backward runs; one small all-reduce adds losses and counts; the optimizer multiplies
the summed gradient by (clip coefficient / global count) as it steps. So the mean is over what was counted
anywhere, however unevenly it is spread over ranks and microbatches, and no sweep over the gradients is spent
on dividing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.data_parallel import guard, state
from mlsys_engine.data_parallel.accumulation import Accumulation
from mlsys_engine.data_parallel.arenas import ModelArenas
from mlsys_engine.data_parallel.buffers import BufferSync
from mlsys_engine.data_parallel.forward import ForwardPass
from mlsys_engine.data_parallel.invariance import refuse_changed_buffers
from mlsys_engine.data_parallel.part_norms import PartNorms
from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.data_parallel.reductions import Reduction
from mlsys_engine.data_parallel.share import Share, over_parts
from mlsys_engine.data_parallel.statistics import StepStatistics
from mlsys_engine.data_parallel.update import Update
from mlsys_engine.errors import CheckpointError, DataError
from mlsys_engine.memory.flat_shard import FlatShard
from mlsys_engine.numerics import (
    Loss,
    autocast,
    gradient_scale,
    numerics_mode,
)
from mlsys_engine.optim import GradientNoiseScale, LossScaler
from mlsys_engine.plan import EvalResult, Plan, StepResult


class DataParallelRunner:
    """A plan.Runner; `build` in this folder makes it. Every rank calls step, evaluate and close alike."""

    def __init__(
        self,
        *,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        update: Update,
        arenas: ModelArenas,
        reducer: Reducer,
        reduction: Reduction | None,
        accumulation: Accumulation,
        sum_over_data: Callable[..., Any] | None,
        buffers: BufferSync,
        statistics: StepStatistics,
        loss: Loss | None,
        max_grad_norm: float | None,
        data_rank: int,
        device: torch.device,
        share: Share | None = None,
        scaler: LossScaler | None = None,
        parts: PartNorms | None = None,
    ) -> None:
        self.plan = plan
        self.reducer = reducer
        self._model, self._optimizer, self._update = model, optimizer, update
        self._arenas, self._buffers = arenas, buffers
        self._reduction, self._accumulation, self._sum_over_data = reduction, accumulation, sum_over_data
        self._forward = ForwardPass(model, loss=loss, precision=plan.precision, device=device)
        self._max_grad_norm = max_grad_norm
        self._data_rank, self._device, self._share = data_rank, device, share
        self._statistics = statistics
        self._scaler, self._parts = scaler, parts
        self._part_totals: torch.Tensor | None = None  # of the present step, when its parts are measured

    @property
    def data_rank(self) -> int:
        return self._data_rank

    @property
    def num_data_shards(self) -> int:
        return self.plan.axis("data")

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, batches: Sequence[Any]) -> StepResult:
        """One optimizer step over all ranks' microbatches, in the train or eval mode that the modules are in.

        A rank may have fewer microbatches than the others, or none. Afterwards `.grad` of every parameter
        that some rank used is the reduced gradient: the sum over everything counted with the engine's
        optimizers (divide by `num_tokens` for the mean, and in fp16 by the loss scale), mean and clipped with
        torch's, which need it so.
        With sharded optimizer state no rank has all of it, and `.grad` is None.
        """
        if not isinstance(batches, list | tuple):
            raise DataError(
                f"step was given a {type(batches).__name__}.",
                "It takes the list of this rank's microbatches.",
                "Pass [batch] for a single one.",
            )
        self._arenas.check_in_place()
        clock = _Clock()
        try:
            with numerics_mode(self.plan.numerics):
                self._accumulate(batches, clock)
                self._reduce(clock)
                return self._finish_step(clock)
        except BaseException:
            self.reducer.cancel()
            raise

    def _accumulate(self, batches: Sequence[Any], clock: _Clock) -> None:
        self._statistics.clear()
        if self._parts is not None:
            self._parts.begin()
        on_part = None if self._parts is None else self._parts.end_part
        loss_sum, count = self._accumulation.run(batches, self._forward.loss, clock.lap, on_part)
        changed = self._buffers.changed()
        if self.plan.numerics == "world_invariant" and any(changed):
            raise refuse_changed_buffers()
        self._statistics.fill(loss_sum, count, self.reducer.used, changed)

    def _reduce(self, clock: _Clock) -> None:
        # The same order of collectives on every rank: buckets, parts, statistics, running statistics, other
        # buffers.
        self.reducer.finish()
        if self._reduction is not None:
            self._reduction.finish()
        # By itself, so that the statistics are summed as they are without it.
        self._part_totals = None if self._parts is None else self._parts.totals(self._statistics.count)
        works = [] if self._part_totals is None else [self._all_reduce(self._part_totals)]
        works.append(self._all_reduce(self._statistics.vector))
        self._buffers.start()
        self.reducer.wait()
        for work in works:
            if work is not None:
                work.wait()
        self._buffers.finish(self._statistics.changed_anywhere() if self._buffers.num_watched else ())
        # Where this rank used everything, every parameter was used somewhere: no need to read the device.
        used = self.reducer.used
        self.reducer.settle(used if all(used) else self._statistics.used_anywhere())
        clock.lap("wait")

    def _finish_step(self, clock: _Clock) -> StepResult:
        loss_sum, count, squares = over_parts(
            self._share, self._statistics.loss_sum, self._statistics.count, self._update.sum_of_squares()
        )
        # Of this step: the update below writes into the scaler's own.
        loss_scale = None if self._scaler is None else self._scaler.current(count.device).clone()
        divisor = count if loss_scale is None else count * loss_scale
        scale = gradient_scale(squares, divisor, self._max_grad_norm)
        self._update.step(scale)
        measured = {}
        if self._scaler is not None and loss_scale is not None:
            measured["loss_scale"] = loss_scale
            self._scaler.observe(~torch.isfinite(squares))  # of the reduced gradient, so all ranks agree
            self._scaler.update()
        if self._parts is not None and self._part_totals is not None:
            measured["noise_scale"] = self._parts.finish(
                self._part_totals, big_squared=scale.norm.square(), count=count, loss_scale=loss_scale
            )
        clock.lap("optimizer")
        return StepResult(
            loss=loss_sum / count,
            grad_norm=scale.norm,
            skipped=scale.skip,
            num_tokens=count.to(torch.int64),
            timings=clock.seconds,
            measured=measured,
        )

    def evaluate(self, batch: Any | None) -> EvalResult:
        """Loss and count of this rank's share (None: it has none), summed over all ranks, in eval mode."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        if batch is not None:
            with _evaluating(self._model, self._optimizer), numerics_mode(self.plan.numerics):
                totals[0], totals[1] = self._accumulation.evaluate(batch, self._forward.loss)
        work = self._all_reduce(totals)
        if work is not None:
            work.wait()
        loss_sum, count, _ = over_parts(self._share, totals[0], totals[1], torch.zeros_like(totals[0]))
        return EvalResult(loss_sum=loss_sum, count=count.to(torch.int64))

    def predict(self, batch: Any) -> Any:
        """The model's output for this rank's own batch, in eval mode and without gradients."""
        with (
            _evaluating(self._model, self._optimizer),
            numerics_mode(self.plan.numerics),
            autocast(self.plan.precision, self._device),
        ):
            return self._accumulation.predict(batch, self._forward.output)

    def state_dict(self, full: bool = False) -> dict[str, Any]:
        """Model and optimizer by parameter name; live tensors, or with `full` private copies on the CPU.

        A sharded optimizer's moments are FlatShards; with `full` they are gathered, so every rank calls it.
        A compressed reduction adds "reduction", which is this rank's alone. The same on every rank are
        "accumulation" (world-invariant numerics), "loss_scaler" (fp16) and "noise_scale" (where it is
        measured).
        """
        result = {
            "model": state.model_state(self._model, full, self.elsewhere),
            "optimizer": self._update.optimizer_state(self._model, full),
        }
        if self._reduction is not None and (own := self._reduction.state_dict()):
            result["reduction"] = state.copied(own) if full else own
        if shared := self._accumulation.state_dict():
            result["accumulation"] = shared
        result |= {key: part.state_dict() for key, part in self._carried().items()}
        return self._share.whole(result) if full and self._share is not None else result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies what `state_dict` returned, here or under another layout, into place; equal on every rank.

        Without "optimizer" only the model is loaded, for weights that come from elsewhere. What else is
        missing starts anew: a compressed reduction, the loss scale, the measured noise scale.
        """
        known = {"model", "optimizer", "reduction", "accumulation", "loss_scaler", "noise_scale"}
        if unexpected := state_dict.keys() - known or "model" not in state_dict:
            raise CheckpointError(
                f"A state dictionary with the keys {sorted(state_dict)[:5]}.",
                'A runner\'s state has "model" and, to go on training, "optimizer".',
                f'Pass {{"model": weights}} to load weights alone.{" " if unexpected else ""}',
            )
        if self._share is not None:
            state_dict = self._share.local(state_dict)
        state.load_model_state(self._model, state_dict["model"], self.elsewhere)
        if "optimizer" in state_dict:
            state.restore_masters(self._model, state_dict["optimizer"]["state"])
            self._update.load_optimizer_state(self._model, state_dict["optimizer"])
            if self._reduction is not None and self._reduction.state_dict():
                self._reduction.load_state_dict(state_dict.get("reduction", {}))
            self._accumulation.load_state_dict(state_dict.get("accumulation", {}))
            for key, part in self._carried().items():
                if key in state_dict:
                    part.load_state_dict(state_dict[key])

    def _carried(self) -> dict[str, LossScaler | GradientNoiseScale]:
        """What goes from step to step besides model, optimizer and sums; by its key in the state."""
        carried: dict[str, LossScaler | GradientNoiseScale] = {}
        if self._scaler is not None:
            carried["loss_scaler"] = self._scaler
        if self._parts is not None:
            carried["noise_scale"] = self._parts.meter
        return carried

    @property
    def elsewhere(self) -> frozenset[str]:
        """Names of parameters and buffers that other ranks hold, and this one does not."""
        return frozenset() if self._share is None else self._share.elsewhere

    @property
    def holds_parts(self) -> bool:
        """Whether parameters are cut over ranks: live tensors are then parts, which only `full` joins."""
        return self._share is not None and self._share.holds_parts

    def joined(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A tensor shaped like the parameter `name` is here, its gradient say, as one of the whole's shape.

        The ranks that hold its parts call it together.
        """
        return part if self._share is None else self._share.joined(name, part)

    def place_state(self, name: str, key: str) -> FlatShard | None:
        """Where a checkpoint's piece `key` of the optimizer state of parameter `name` is loaded to.

        For state that does not exist yet; None where every rank has all of it.
        """
        return self._update.place_state(name, key)

    def close(self) -> None:
        """Gives the model back as an ordinary module with its weights; the runner is of no use afterwards.

        Where the optimizer averages the weights, they are the average. A divided model becomes whole again on
        every rank.
        """
        if hasattr(self._optimizer, "eval"):
            self._optimizer.eval()
        self.reducer.close()
        guard.release(self._model)
        self._arenas.release()
        if self._share is not None:
            self._share.give_back(self._model)

    def _all_reduce(self, tensor: torch.Tensor) -> dist.Work | None:
        return None if self._sum_over_data is None else self._sum_over_data(tensor)


class _Clock:
    """Seconds of this rank's own time by phase; on a GPU, the time to issue the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


@contextmanager
def _evaluating(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back, frozen layers included.

    An optimizer with an average of the weights, such as ScheduleFreeAdamW, puts it in for that time.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    averages = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if averages:
        optimizer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if averages:
            optimizer.train()
        for module, training in modes:
            module.training = training
