"""Finds the subcommand and gives every failure its form: a mistake its three parts, a bug its traceback."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlsys_engine import __version__
from mlsys_engine.comm.launch import detect
from mlsys_engine.comm.launch.failure import FailureHook
from mlsys_engine.errors import ConfigError, LaunchError, NativeBuildError, UserError, did_you_mean

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# torchrun ends a job when its first rank leaves: the others give the one that tells the time to do so.
_LINGER_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: what `mlsys --help` says of it, and the function that takes its arguments."""

    usage: str
    purpose: str
    function: str


COMMANDS = {
    "train": Command(
        usage="train [RECIPE] [options]",
        purpose="train a recipe; without one, a small GPT on text that every machine has",
        function="mlsys_engine.cli.train:run",
    ),
    "plan": Command(
        usage="plan [RECIPE] [--verify]",
        purpose="the layout of a recipe's training; --verify proves it against one process",
        function="mlsys_engine.cli.plan:run",
    ),
    "runs": Command(
        usage="runs list|show|plot",
        purpose="the records of earlier trainings",
        function="mlsys_engine.cli.runs:run",
    ),
    "doctor": Command(
        usage="doctor [--hang DIR]",
        purpose="what was built and found here, and a short self-test; or why a job hung",
        function="mlsys_engine.cli.doctor:run",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for a caller's mistake, 130 when interrupted.

    Unexpected exceptions leave it, and Python shows their traceback once. In a rank that has begun to join
    a job, mistakes leave it too: there the excepthook of `mls.init()` tells one of them for all ranks.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except (UserError, NativeBuildError) as error:
        if isinstance(sys.excepthook, FailureHook):
            raise
        if _another_rank_tells():
            time.sleep(_LINGER_S)
        else:
            sys.stderr.write(describe(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leave:  # tyro has told what is wrong with the arguments, or shown the help
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)


def entry_point() -> None:
    """What the installed `mlsys` script calls."""
    sys.exit(main())


def describe(error: UserError | NativeBuildError) -> str:
    """The message for a terminal: what was given, what was expected, what to do, a line each."""
    if not isinstance(error, UserError):
        return f"mlsys: {error}\n"
    given, *others = [part for part in (error.given, error.expected, error.action) if part]
    return "\n       ".join([f"mlsys: {given}", *others]) + "\n"


def usage() -> str:
    """The text of `mlsys --help`."""
    width = max(len(command.usage) for command in COMMANDS.values()) + 2
    lines = [f"  mlsys {command.usage:<{width}}{command.purpose}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "usage: mlsys COMMAND [options]",
            "",
            "A distributed training engine with native kernels.",
            "",
            *lines,
            "",
            "mlsys COMMAND --help shows a command's options; mlsys --version the version.",
            "",
        ]
    )


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h", "help"):
        sys.stdout.write(usage())
        return 0
    if first in ("--version", "-V"):
        sys.stdout.write(f"mlsys_engine {__version__}\n")
        return 0
    return load_command(first)(arguments[1:])


def load_command(name: str) -> Callable[[list[str]], int]:
    """The function of a subcommand; only its own modules are imported."""
    if name not in COMMANDS:
        raise ConfigError(
            f"There is no command {name!r}.",
            f"Commands are {', '.join(COMMANDS)}.",
            f"{did_you_mean(name, COMMANDS)} Type: mlsys --help",
        )
    module, _, attribute = COMMANDS[name].function.partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), attribute)
    return function


def _another_rank_tells() -> bool:
    """Whether this is a further rank of a host: mistakes found before the ranks meet are the same on all."""
    try:
        placement = detect(os.environ)
    except LaunchError:
        return False
    return bool(placement.rank if placement.local_rank is None else placement.local_rank)
