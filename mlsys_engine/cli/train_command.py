"""The command line of `mlsys train` as one checked value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from mlsys_engine import checkpoint
from mlsys_engine.comm.launch import detect, launched
from mlsys_engine.errors import CheckpointError, ConfigError, LaunchError
from mlsys_engine.recipes import DEFAULT_RECIPE, RECIPES, Recipe, recipe_class, recipe_from_record
from mlsys_engine.tracking import find_run, read_run

T = TypeVar("T")
DEFAULT_RANKS = 2
_CONFIG = (tyro.conf.FlagCreatePairsOff,)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `mlsys train` takes besides the recipe's own settings."""

    ranks: int | None = None
    """Ranks to start here; None starts two, or as many as a resumed run had."""
    dry_run: bool = False
    """Print the plan and stop."""
    run_dir: Path | None = None
    """Folder of this run's record and checkpoints; the same command goes on with the training in it."""
    runs_dir: Path = Path("runs")
    """Folder that holds the runs, each in a folder of its own."""
    resume: str | None = None
    """Run to go on with, by its recorded settings: 'latest', an id, the beginning of one, or a path."""
    json: bool = False
    """Print the finished run's record as JSON on stdout, and everything else on stderr."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """A training as asked for; `resumed_dir` is the folder of the run that `--resume` names."""

    recipe_name: str
    recipe: Recipe
    options: TrainOptions
    resumed_dir: Path | None = None
    resumed_ranks: int | None = None

    @property
    def run_dir(self) -> Path | None:
        """The folder that was asked for; None leaves the choice to the training."""
        return self.resumed_dir or self.options.run_dir

    def num_ranks(self, variables: Mapping[str, str]) -> int:
        """How many ranks the training has. Raises LaunchError when --ranks contradicts the launcher."""
        asked = self.options.ranks
        if asked is not None and asked < 1:
            raise LaunchError(f"--ranks {asked}.", "A job has at least 1 rank.", "Type: --ranks 1, or more.")
        if launched(variables):
            placement = detect(variables)
            if asked not in (None, placement.world_size):
                raise LaunchError(
                    f"--ranks {asked}, but the launcher started {placement.world_size}.",
                    "Under a launcher its number of ranks is the world size, and --ranks starts none.",
                    f"Leave out --ranks, or have the launcher start {asked}.",
                )
            return placement.world_size
        return asked or self.resumed_ranks or DEFAULT_RANKS


def parse(arguments: Sequence[str]) -> TrainCommand:
    """Reads the command line; tyro tells of unknown options and leaves with status 2."""
    name, rest = take_recipe(arguments)
    defaults, resumed_dir, resumed_ranks = None, None, None
    if _asks_to_resume(rest):
        early, _ = tyro.cli(
            TrainOptions, args=rest, prog="mlsys train", config=_CONFIG, return_unknown_args=True
        )
        resumed_dir = _resumed_dir(early)
        record = read_run(resumed_dir)
        recorded_name, defaults = recipe_from_record(record.manifest)
        resumed_ranks = record.fields.get("world_size")
        if name not in (None, recorded_name):
            raise ConfigError(
                f"The recipe {name!r} to resume {record.id}.",
                f"That run was trained by {recorded_name!r}.",
                "Leave out the recipe: the run's record has it and its settings.",
            )
        name = recorded_name
    name = name or DEFAULT_RECIPE
    options, recipe = parse_options(f"mlsys train {name}", name, TrainOptions(), rest, defaults=defaults)
    return TrainCommand(
        recipe_name=name,
        recipe=recipe,
        options=options,
        resumed_dir=resumed_dir,
        resumed_ranks=resumed_ranks,
    )


def parse_options(
    prog: str, name: str, options: T, arguments: Sequence[str], *, defaults: Recipe | None = None
) -> tuple[T, Recipe]:
    """The command's options, whose defaults are `options`, and the settings of the recipe `name`."""
    kind = recipe_class(name)
    flat = tyro.conf.arg(name="")  # options without a prefix
    recipe_field: Any = dataclasses.field() if defaults is None else dataclasses.field(default=defaults)
    combined = dataclasses.make_dataclass(
        "Train",
        [
            ("options", Annotated[type(options), flat], dataclasses.field(default=options)),
            ("recipe", Annotated[kind, flat], recipe_field),
        ],
        kw_only=True,
    )
    parsed: Any = tyro.cli(
        combined,
        args=list(arguments),
        prog=prog,
        description=f"{kind.__doc__}\nRecipes: {', '.join(RECIPES)}.",
        config=_CONFIG,
    )
    return parsed.options, parsed.recipe


def take_recipe(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe's name, first or anywhere among the options, and the other arguments."""
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        recipe_class(rest[0])  # an unknown name is told by our own message
        return rest[0], rest[1:]
    name = next((word for word in rest if word in RECIPES), None)
    if name is not None:
        rest.remove(name)
    return name, rest


def _asks_to_resume(arguments: Sequence[str]) -> bool:
    asks_for_help = any(word in ("-h", "--help") for word in arguments)
    return not asks_for_help and any(word.split("=")[0] == "--resume" for word in arguments)


def _resumed_dir(options: TrainOptions) -> Path:
    """The folder to go on in, made absolute: ranks must not look for 'latest' themselves."""
    assert options.resume is not None
    if options.run_dir is not None:
        raise ConfigError(
            f"--resume {options.resume} and --run-dir {options.run_dir}.",
            "Both name the folder of the run.",
            "Use --resume for an existing run, --run-dir for the folder of a new one.",
        )
    folder = find_run(options.resume, options.runs_dir).resolve()
    if checkpoint.latest(folder / "checkpoints") is None:
        raise CheckpointError(
            f"The run {folder.name} has no complete checkpoint.",
            "Resuming goes on from one; they are written every --save-every steps and when a run is stopped.",
            "Start it anew: mlsys train, with the settings that `mlsys runs show` prints.",
        )
    return folder


def pin_resumed(arguments: Sequence[str], command: TrainCommand) -> list[str]:
    """The arguments for the ranks: --resume names the folder that the parent has found."""
    if command.resumed_dir is None:
        return list(arguments)
    pinned, after_flag = [], False
    for word in arguments:
        if after_flag:
            pinned.append(str(command.resumed_dir))
        elif word.startswith("--resume="):
            pinned.append(f"--resume={command.resumed_dir}")
        else:
            pinned.append(word)
        after_flag = word == "--resume"
    return pinned
