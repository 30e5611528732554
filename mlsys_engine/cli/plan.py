"""`mlsys plan`: the layout of a recipe's training on some ranks, and the proof that its numbers are right."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_engine import strategies
from mlsys_engine.cli.output import Output
from mlsys_engine.cli.train_command import DEFAULT_RANKS, parse_options, take_recipe
from mlsys_engine.comm.launch import init, launched
from mlsys_engine.errors import LaunchError
from mlsys_engine.plan import Plan
from mlsys_engine.recipes import DEFAULT_RECIPE, RecipeRun
from mlsys_engine.verify import Verdict, verify

EXIT_DIFFERENT = 1
_PLAN_OPTIONS = ("precision", "accumulate", "activation", "numerics", "compile")


@dataclass(frozen=True, kw_only=True)
class PlanCommandOptions:
    """What `mlsys plan` takes besides the recipe's own settings."""

    ranks: int | None = None
    """Ranks to plan for; None plans for two, or for the launcher's."""
    verify: bool = False
    """Take one step under the plan and one in one process, and compare them; status 1 where they differ."""
    json: bool = False
    """Print plan and verdict as JSON on stdout, and everything else on stderr."""


def run(arguments: Sequence[str]) -> int:
    """Prints the plan, and the verdict where one is asked for; returns the exit status."""
    name, rest = take_recipe(arguments)
    name = name or DEFAULT_RECIPE
    options, recipe = parse_options(f"mlsys plan {name}", name, PlanCommandOptions(), rest)
    world = init() if launched(os.environ) else None
    num_ranks = options.ranks or (DEFAULT_RANKS if world is None else world.world_size)
    if num_ranks < 1 or (world is not None and num_ranks != world.world_size):
        raise LaunchError(
            f"--ranks {num_ranks}" + ("." if world is None else f" in a job of {world.world_size}."),
            "A plan is for at least 1 rank, and under a launcher for its ranks.",
            "Leave out --ranks, or give another number.",
        )
    recipe.check(num_ranks)
    training = recipe.build(with_baselines=False)
    plan = plan_of(training, num_ranks)
    out = Output(as_json=options.json, silent=world is not None and world.rank != 0)
    out.say(str(plan))
    verdict = verdict_on(training, plan) if options.verify else None
    if verdict is not None:
        out.say(str(verdict))
    shown = None if verdict is None else json.loads(verdict.to_json())
    out.json({"plan": json.loads(plan.to_json()), "verdict": shown})
    return 0 if verdict is None or verdict.ok else EXIT_DIFFERENT


def plan_of(training: RecipeRun, num_ranks: int) -> Plan:
    """What the training would run on so many ranks. Starts none and writes nothing."""
    loader, settings = training.train_loader, training.trainer_kwargs
    sample = loader.collate_fn([loader.dataset[0]])
    options = {name: settings[name] for name in _PLAN_OPTIONS}
    if settings["numerics"] == "world_invariant":
        options["seed"] = settings["seed"]
    return strategies.plan(training.model, settings["strategy"], sample, world=num_ranks, **options)


def verdict_on(training: RecipeRun, plan: Plan) -> Verdict:
    """One step on the first global batch, in float64, with the recipe's loss and clipping."""
    loader, settings = training.train_loader, training.trainer_kwargs
    batch = loader.collate_fn([loader.dataset[index] for index in range(loader.batch_size or 1)])
    return verify(
        training.model, plan, batch, loss=settings.get("loss"), max_grad_norm=settings["max_grad_norm"]
    )
