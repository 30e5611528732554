"""The arguments of one `fit`, validated before anything is planned, built or opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlsys_engine.checkpoint import DEFAULT_KEEP_LAST
from mlsys_engine.errors import ConfigError, did_you_mean

_RECORD_KEYS = ("baselines", "config", "data")


@dataclass(frozen=True, kw_only=True)
class SaveEvery:
    """When checkpoints are written and how many stay; `save_every=100` means `SaveEvery(steps=100)`."""

    steps: int
    """Optimizer steps from one checkpoint to the next; one more is written at the end."""
    keep_last: int = DEFAULT_KEEP_LAST
    """Complete checkpoints that are kept, the newest ones."""

    def __post_init__(self) -> None:
        check_positive("save_every", self.steps)
        check_positive("keep_last", self.keep_last)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How long to train, and what to do on the way."""

    max_steps: int | None
    epochs: int | None
    has_eval_loader: bool
    eval_every: int | None
    save_every: SaveEvery | None
    resume: str | Path | None
    record: Mapping[str, Any]

    @classmethod
    def checked(
        cls,
        *,
        max_steps: int | None,
        epochs: int | None,
        has_eval_loader: bool,
        eval_every: int | None,
        save_every: int | SaveEvery | None,
        resume: str | Path | bool | None,
        record: Mapping[str, Any] | None,
    ) -> FitOptions:
        """From what `fit` was given. Raises ConfigError for what cannot work."""
        if max_steps is None and epochs is None:
            raise ConfigError(
                "fit() got neither max_steps nor epochs.",
                "It trains for max_steps optimizer steps or epochs passes of the data, whichever ends first.",
                "For example fit(loader, max_steps=1000).",
            )
        for name, value in (("max_steps", max_steps), ("epochs", epochs), ("eval_every", eval_every)):
            if value is not None:
                check_positive(name, value)
        if eval_every is not None and not has_eval_loader:
            raise ConfigError(
                f"fit() got eval_every={eval_every} without an eval_loader.",
                "Evaluation needs data of its own.",
                "Pass eval_loader=, or leave eval_every out.",
            )
        if save_every is not None and not isinstance(save_every, SaveEvery):
            save_every = SaveEvery(steps=save_every)
        return cls(
            max_steps=max_steps,
            epochs=epochs,
            has_eval_loader=has_eval_loader,
            eval_every=eval_every,
            save_every=save_every,
            resume=_checked_resume(resume),
            record=_checked_record(record),
        )


def check_positive(name: str, value: object) -> None:
    """Refuses anything but an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{name}={value!r}.",
            f"{name} is a whole number of at least 1.",
            f"Pass {name} as a positive int.",
        )


def _checked_resume(resume: str | Path | bool | None) -> str | Path | None:
    if resume is None or resume is False:
        return None
    if isinstance(resume, str | Path):
        return resume
    raise ConfigError(
        f"resume={resume!r}.",
        "resume is 'auto' (the newest checkpoint of run_dir, if any), the path of a checkpoint, or None.",
        "Pass resume='auto' together with the run_dir to go on from.",
    )


def _checked_record(record: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for key in record or {}:
        if key not in _RECORD_KEYS:
            raise ConfigError(
                f"record has the key {key!r}.",
                f"The run's record takes {', '.join(_RECORD_KEYS)}.",
                did_you_mean(key, _RECORD_KEYS),
            )
    return record or {}
