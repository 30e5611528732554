"""The Trainer: from a plain module and a loader to a trained model and its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from mlsys_engine import strategies, tracking
from mlsys_engine.activation import ActivationPlan
from mlsys_engine.comm.launch import World, init
from mlsys_engine.data import GlobalBatches
from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import AdamW, GradientNoiseScale, LossScaler
from mlsys_engine.plan import Plan
from mlsys_engine.plan.runner import Runner
from mlsys_engine.trainer import record, resuming, rng_state
from mlsys_engine.trainer.evaluating import evaluate
from mlsys_engine.trainer.events import Callbacks
from mlsys_engine.trainer.loop import FitResult, Loop, batches_left
from mlsys_engine.trainer.options import FitOptions, SaveEvery, check_positive
from mlsys_engine.trainer.progress import open_view
from mlsys_engine.trainer.record import OpenRun
from mlsys_engine.trainer.reporting import Reporter
from mlsys_engine.trainer.schedule import LrSchedule, Schedule
from mlsys_engine.verify import FirstStep


@dataclass(frozen=True, kw_only=True)
class _Built:
    world: World
    plan: Plan
    runner: Runner
    verifier: FirstStep | None


class Trainer:
    """Trains a model under a strategy. Every rank makes one with the same arguments and calls the same
    methods.

    Nothing is planned, opened or started before `fit` or `evaluate`; they join the job (`mls.init`) when
    nobody has. `model` is changed in place. The loader given to `fit` yields *global* batches: its batch_size
    is the number of samples of one optimizer step over all ranks, which `accumulate` cuts into microbatches.

    loss: `loss(output, batch)` giving a mean or `(sum, count)`; None takes the output's `.loss`. optimizer: a
    factory called with (name, parameter) pairs. precision: "fp32", "bf16" or "fp16" (autocast), "bf16-pure"
    or "fp16-pure" (parameters, too). lr_schedule: a function of the step giving the factor of the learning
    rate, or of the optimizer giving a torch scheduler. sample: a batch to plan with (the first one of the
    loader by default). verify: "first_step" compares that step with the unsharded model's on all ranks, and
    raises VerificationError where they differ. callbacks: see `trainer.events`. trackers: names or objects,
    used on rank 0. run_dir: where record and checkpoints go (a new folder below runs/ by default). seed: of
    the data order and of dropout, per data rank; initialising the model is the caller's. loss_scaler: instead
    of the one that fp16 has. noise_scale: measures the gradient noise, which is logged. Raises ConfigError
    for settings that cannot work.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = partial(AdamW, lr=3e-4),  # noqa: B008 (so is this)
        strategy: Any = strategies.DataParallel(),  # noqa: B008 (a frozen value)
        precision: str = "fp32",
        lr_schedule: LrSchedule | None = None,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        activation: str | float | ActivationPlan | None = None,
        compile: bool = False,
        sample: Any = None,
        verify: str | None = None,
        callbacks: Sequence[Any] = (),
        trackers: Sequence[str | tracking.Tracker] = ("local",),
        run_dir: str | Path | None = None,
        seed: int = 0,
        numerics: str = "fast",
        loss_scaler: LossScaler | None = None,
        noise_scale: GradientNoiseScale | None = None,
    ) -> None:
        _check_settings(model, max_grad_norm, accumulate, verify, seed)
        strategies.check_loss(loss)
        tracking.check_trackers(trackers)
        self._settings = {
            key: record.described(value)
            for key, value in locals().items()
            if key not in ("self", "model", "sample", "run_dir")
        }
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._lr_schedule, self._max_grad_norm, self._sample = lr_schedule, max_grad_norm, sample
        self._loss_scaler, self._noise_scale = loss_scaler, noise_scale
        self._strategy = strategies.from_name(strategy)
        self._accumulate, self._seed, self._verify = accumulate, seed, verify
        self._plan_options: dict[str, Any] = {
            "precision": precision,
            "accumulate": accumulate,
            "activation": activation,
            "numerics": numerics,
            "compile": compile,
            "seed": seed
            if numerics == "world_invariant"
            else None,  # else the trainer seeds each rank itself
        }
        self._callbacks, self._trackers = Callbacks(callbacks), tuple(trackers)
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._built: _Built | None = None
        self._has_fitted = self._is_bytes = False

    def fit(
        self,
        train_loader: DataLoader[Any],
        *,
        max_steps: int | None = None,
        epochs: int | None = None,
        eval_loader: DataLoader[Any] | None = None,
        eval_every: int | None = None,
        save_every: int | SaveEvery | None = None,
        resume: str | Path | bool | None = "auto",
        record: Mapping[str, Any] | None = None,
    ) -> FitResult:
        """Trains to `max_steps` optimizer steps or `epochs` passes, counted from zero, whichever comes first.

        Evaluates every `eval_every` steps and at the end; saves every `save_every` steps and at the end, and
        always before leaving on SIGTERM, SIGINT or SIGUSR1 (then raising TrainingInterrupted, a SystemExit
        with status 128 + signal). resume="auto" goes on from the newest checkpoint in run_dir, a path from
        that one, None starts anew. `record` adds to the run's record: "baselines", "config" and "data" (a
        manifest; {"unit": "byte"} makes evaluations report bits per byte).
        """
        options = FitOptions.checked(
            max_steps=max_steps,
            epochs=epochs,
            has_eval_loader=eval_loader is not None,
            eval_every=eval_every,
            save_every=save_every,
            resume=resume,
            record=record,
        )
        if self._has_fitted:
            raise ConfigError(
                "fit() was called a second time.",
                "A Trainer holds one training.",
                "Make a new Trainer; with the same run_dir it goes on from the last checkpoint.",
            )
        self._is_bytes = (options.record.get("data") or {}).get("unit") == "byte"
        built = self._build(train_loader)
        self._has_fitted = True
        return self._start(built, train_loader, eval_loader, options).run()

    def evaluate(self, loader: DataLoader[Any]) -> dict[str, float]:
        """The mean loss over `loader` on all ranks as `{"val_loss": ...}` (and bits per byte, like `fit`)."""
        built = self._build(loader)
        return evaluate(built.runner, loader, is_bytes=self._is_bytes)

    def _build(self, loader: DataLoader[Any]) -> _Built:
        if self._built is None:
            world = init()
            sample = self._sample
            if sample is None:
                sample = _first_microbatch(loader, world.world_size * self._accumulate)
            plan = strategies.plan(
                self._model, self._strategy, sample, world=world, loss=self._loss, **self._plan_options
            )
            verifier = self._verifier(plan)  # before the model is laid out
            runner = strategies.apply(
                plan,
                self._model,
                optimizer=self._optimizer,
                loss=self._loss,
                max_grad_norm=self._max_grad_norm,
                loss_scaler=self._loss_scaler,
                noise_scale=self._noise_scale,
            )
            self._built = _Built(world=world, plan=plan, runner=runner, verifier=verifier)
        return self._built

    def _verifier(self, plan: Plan) -> FirstStep | None:
        if self._verify is None:
            return None
        return FirstStep(
            self._model,
            plan,
            loss=self._loss,
            optimizer=self._optimizer,
            max_grad_norm=self._max_grad_norm,
        )

    def _start(
        self,
        built: _Built,
        train_loader: DataLoader[Any],
        eval_loader: DataLoader[Any] | None,
        options: FitOptions,
    ) -> Loop:
        """Opens the run, resumes if there is something to resume from, and gives the loop that is left to
        run.
        """
        world, plan, runner = built.world, built.plan, built.runner
        self._built = replace(built, verifier=None)  # it is used once, and holds a model
        batches = GlobalBatches(
            train_loader,
            data_rank=runner.data_rank,
            num_data_shards=runner.num_data_shards,
            accumulate=plan.accumulate,
            seed=self._seed,
            fixed_pieces=plan.numerics == "world_invariant",
        )
        state = resuming.TrainingState(
            runner=runner,
            schedule=Schedule(self._lr_schedule, runner.optimizer),
            batches=batches,
            plan_hash=plan.hash,
            world_invariant=plan.numerics == "world_invariant",
            seed=self._seed,
            world=world,
        )
        run = self._open_run(world, options)
        rng_state.seed_generators(self._seed, runner.data_rank)
        step, notes = 0, [f"Run {run.id} in {run.folder}", str(plan), _batch_sizes(batches, plan.accumulate)]
        notes += _into_train_mode(self._model)
        if run.checkpoint is not None:
            step, differences = state.restore(run.checkpoint)
            notes += [f"Resuming from {run.checkpoint} after step {step}.", *differences]
            notes += record.decided_by_rank_0(lambda: resuming.set_newer_aside(run), world)
        total = _total_steps(options, step, batches)
        trackers = self._start_trackers(built, run, options, train_loader, step)
        reporter = Reporter(trackers, open_view(world.rank, step, total), total)
        for note in notes:
            reporter.message(note)
        if step >= total:
            reporter.message(f"Nothing is left to train: the checkpoint is after step {step} of {total}.")
        return Loop(
            state=state,
            plan=plan,
            options=options,
            first_step=step,
            total_steps=total,
            saved_path=run.checkpoint if run.goes_on_in_place else None,
            run_dir=run.folder,
            eval_loader=eval_loader,
            is_bytes=self._is_bytes,
            callbacks=self._callbacks,
            reporter=reporter,
            verifier=built.verifier,
        )

    def _open_run(self, world: World, options: FitOptions) -> OpenRun:
        def decide() -> OpenRun:
            run_id, folder = record.open_run_dir(self._run_dir)
            path = resuming.find_checkpoint(options, folder, run_dir_given=self._run_dir is not None)
            return OpenRun(id=run_id, folder=folder, checkpoint=path)

        return record.decided_by_rank_0(decide, world)

    def _start_trackers(
        self, built: _Built, run: OpenRun, options: FitOptions, loader: DataLoader[Any], step: int
    ) -> list[tracking.Tracker]:
        """Starts the trackers on rank 0; if they refuse, every rank raises."""
        trackers: list[tracking.Tracker] = []

        def start() -> None:
            trackers.extend(tracking.make_trackers(self._trackers, run.folder))
            info = record.run_info(
                run,
                world=built.world,
                plan=built.plan,
                settings=self._settings,
                record=options.record,
                loader=loader,
                resumed_from_step=step if run.checkpoint is not None else None,
            )
            for tracker in trackers:
                tracker.start(info)

        record.decided_by_rank_0(start, built.world)
        return trackers


def _check_settings(
    model: object, max_grad_norm: object, accumulate: object, verify: object, seed: object
) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"Trainer got a {type(model).__name__} as its model.",
            "The model is a torch.nn.Module.",
            "Pass the module itself.",
        )
    if max_grad_norm is not None and not (isinstance(max_grad_norm, int | float) and max_grad_norm > 0):
        raise ConfigError(
            f"max_grad_norm={max_grad_norm!r}.",
            "It is the positive global 2-norm to which gradients are clipped, or None.",
            "Pass for example max_grad_norm=1.0.",
        )
    check_positive("accumulate", accumulate)
    if verify not in (None, "first_step"):
        raise ConfigError(
            f"verify={verify!r}.",
            'It is "first_step", which compares that step with the unsharded model\'s, or None.',
            'Pass verify="first_step", or leave it out.',
        )
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(
            f"seed={seed!r}.", "A seed is a whole number of at least 0.", "Pass for example seed=0."
        )


def _into_train_mode(model: torch.nn.Module) -> list[str]:
    """Puts a model that is as a whole in eval mode (as `from_pretrained` gives it) into train mode.

    Where the model itself is in train mode, the modes of its submodules are the caller's choice.
    """
    if model.training:
        return []
    model.train()
    return [f"{type(model).__name__} was in eval mode: model.train() was called, so dropout is on."]


def _first_microbatch(loader: DataLoader[Any], num_microbatches: int) -> Any:
    # What one rank gets of one global batch when all ranks are data ranks; the same on every rank.
    pieces = max(1, min(num_microbatches, getattr(loader, "batch_size", None) or 1))
    shares = GlobalBatches(loader, data_rank=0, num_data_shards=1, accumulate=pieces)
    return next(iter(shares))[0]


def _total_steps(options: FitOptions, step: int, batches: GlobalBatches) -> int:
    """The step at which the training ends: max_steps, or the end of the last epoch, whichever comes first."""
    limits = [] if options.max_steps is None else [options.max_steps]
    if options.epochs is not None:
        whole_epochs = max(options.epochs - batches.epoch - 1, 0)
        begun = batches_left(batches) if batches.epoch < options.epochs else 0
        limits.append(step + begun + whole_epochs * batches.batches_per_epoch)
    return min(limits)


def _batch_sizes(batches: GlobalBatches, accumulate: int) -> str:
    shards = batches.layout.num_data_shards
    return (
        f"Global batch {batches.global_batch_size} samples a step (the loader's batch_size): "
        f"{batches.per_rank_batch_size} on each of {shards} data rank{'s' if shards > 1 else ''}"
        + (f", in {accumulate} microbatches" if accumulate > 1 else "")
        + f"; {batches.batches_per_epoch} steps an epoch."
    )
