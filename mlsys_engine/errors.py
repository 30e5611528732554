"""The one family of errors. A message has three parts: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MlsysError(Exception):
    """Base of every error that the engine raises on purpose."""


class UserError(MlsysError, ValueError):
    """The caller's mistake; the commands print it without a traceback and exit with status 2."""

    def __init__(self, given: str, expected: str, action: str) -> None:
        self.given, self.expected, self.action = given, expected, action
        super().__init__(" ".join(part.strip() for part in (given, expected, action) if part))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        return type(self), (self.given, self.expected, self.action)


class LaunchError(UserError):
    """The launcher's variables are missing or contradict each other."""


class ConfigError(UserError):
    """A strategy, recipe, trainer or optimizer setting that cannot work."""


class DataError(UserError):
    """A dataset, loader or batch that cannot be used as given."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, corrupt or of another model."""


class NativeBuildError(MlsysError, RuntimeError):
    """The native extensions are missing, stale, or built for another torch."""


class InternalError(MlsysError, RuntimeError):
    """A broken invariant of the engine itself: please report it."""


class PeerFailedError(MlsysError, RuntimeError):
    """A rank that this rank waited for has failed or left; every survivor raises it, naming the culprit.

    Attributes: `rank` (global, -1 when unknown), `host`, `pid` (0 when unknown), `cause` in words, and the
    collective operation `op` with its `sequence` number on which this rank was waiting.
    """

    def __init__(  # noqa: PLR0917 (the binding raises it positionally)
        self, rank: int, host: str, pid: int, cause: str, op: str, sequence: int
    ) -> None:
        self.rank, self.host, self.pid = rank, host, pid
        self.cause, self.op, self.sequence = cause, op, sequence
        super().__init__(
            f"rank {rank} on {host} (pid {pid}) failed: {cause}. This rank was in {op} #{sequence}. "
            f"Look at that rank's own output for the cause, then start the job again."
        )

    def __reduce__(self) -> tuple[type[PeerFailedError], tuple[int, str, int, str, str, int]]:
        return type(self), (self.rank, self.host, self.pid, self.cause, self.op, self.sequence)


class VerificationError(MlsysError, RuntimeError):
    """The first step of a training is not that of the unsharded model; `verdict` says where they part."""

    def __init__(self, verdict: object) -> None:
        self.verdict = verdict
        super().__init__(str(verdict))


class CollectiveTimeoutError(MlsysError, TimeoutError, RuntimeError):
    """A collective did not finish in time; the message names the ranks that had not arrived.

    Also a RuntimeError, which is what torch's own backends raise then.
    """


class CollectiveMismatchError(MlsysError, RuntimeError):
    """Ranks called different collectives, or the same with another shape, dtype or root."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a mistyped `name` was probably meant to be, or all the known names when none is close."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known names: {', '.join(choices) or 'none'}."
