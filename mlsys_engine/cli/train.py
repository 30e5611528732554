"""`mlsys train`: checks everything, then starts local ranks, or joins the launcher's job as a rank."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from mlsys_engine.cli.output import Output, figure
from mlsys_engine.cli.plan import plan_of
from mlsys_engine.cli.runs import print_comparison
from mlsys_engine.cli.train_command import TrainCommand, parse, pin_resumed
from mlsys_engine.comm.launch import World, detect, init, launch_local, launched
from mlsys_engine.native import build_info
from mlsys_engine.recipes import RecipeRun, recorded_settings
from mlsys_engine.tracking import new_run_id, read_run
from mlsys_engine.trainer import FitResult, Trainer, TrainingInterrupted


def run(arguments: Sequence[str]) -> int:
    """Trains, and returns the exit status. Mistakes are found here, before any rank starts."""
    command = parse(arguments)
    num_ranks = command.num_ranks(os.environ)
    command.recipe.check(num_ranks)
    if command.options.dry_run:
        return _dry_run(command, num_ranks)
    build_info()
    if launched(os.environ) or num_ranks == 1:
        return _train(command)
    return launch_local(["-m", "mlsys_engine.cli", "train", *pin_resumed(arguments, command)], num_ranks)


def _dry_run(command: TrainCommand, num_ranks: int) -> int:
    """Plans in this process; no rank is started and nothing is written."""
    if detect(os.environ).rank != 0:
        return 0
    out = Output(as_json=command.options.json)
    training = command.recipe.build(with_baselines=False)
    plan = plan_of(training, num_ranks)
    if command.options.json:
        out.json(json.loads(plan.to_json()))
    else:
        out.say(str(plan))
        size = training.train_loader.batch_size
        out.say(f"  global batch {size} sequences a step; nothing was started (--dry-run)")
    return 0


def _train(command: TrainCommand) -> int:
    """One rank's training, from joining the job to the last line."""
    world = init()
    out = Output(as_json=command.options.json, silent=world.rank != 0)
    training = command.recipe.build(with_baselines=world.rank == 0)
    _say_what_starts(out, command, world, training)
    run_dir = command.run_dir or _agreed_run_dir(command.options.runs_dir, world)
    trainer = Trainer(training.model, run_dir=run_dir, **training.trainer_kwargs)
    try:
        result = trainer.fit(
            training.train_loader,
            eval_loader=training.eval_loader,
            record={
                "baselines": training.baselines,
                "data": training.data_manifest,
                "config": recorded_settings(command.recipe_name, command.recipe),
            },
            **training.fit_kwargs,
        )
    except TrainingInterrupted as stop:
        out.say(f"Training {stop}.")
        out.say(f"Go on with: mlsys train --resume {shlex.quote(str(run_dir))}")
        return int(stop.code or 0)
    _say_what_came_out(out, result, training.baselines)
    return 0


def _agreed_run_dir(runs_dir: Path, world: World) -> Path:
    """Rank 0 names the run; the Trainer creates the folder when everything else stands."""
    names = [new_run_id() if world.rank == 0 else ""]
    if world.world_size > 1:
        dist.broadcast_object_list(names, src=0)
    return runs_dir / str(names[0])


def _say_what_starts(out: Output, command: TrainCommand, world: World, training: RecipeRun) -> None:
    data = training.data_manifest
    num_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    out.pairs(
        [
            ("recipe", f"{command.recipe_name}, {num_parameters:,} parameters"),
            (
                "ranks",
                f"{world.world_size} on backend {world.backend}, started by {world.launcher}, "
                f"{world.num_threads} thread{'s' * (world.num_threads != 1)} each, {world.device.type}",
            ),
            ("data", f"{data['description']}, fingerprint {str(data['fingerprint'])[:16]}"),
        ]
    )
    print_comparison(out, {}, training.baselines)
    out.say()


def _say_what_came_out(out: Output, result: FitResult, baselines: Mapping[str, object]) -> None:
    record_file, picture = result.run_dir / "run.json", result.run_dir / "loss.svg"
    if out.as_json and record_file.exists():
        out.json(read_run(result.run_dir).to_dict())
    print_comparison(out, result.metrics, baselines)
    out.say()
    shown = [("steps", figure(result.steps))]
    shown += [
        (label, figure(result.metrics[name]))
        for name, label in (("val_loss", "validation loss"), ("tokens_per_s", "tokens a second"))
        if name in result.metrics
    ]
    if record_file.exists():
        shown += [("run record", str(record_file)), ("picture", str(picture))]
    out.pairs(shown)
