"""`mlsys doctor --hang DIR`: what the ranks of a hung job were doing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mlsys_engine.cli.output import Output
from mlsys_engine.comm.hang import Diagnosis, diagnose, read_dumps


def explain(directory: Path, out: Output) -> int:
    """Prints the diagnosis of the dumps in a folder; status 0 whatever it is."""
    diagnosis = diagnose(read_dumps(directory))
    out.json(dataclasses.asdict(diagnosis))
    _print(diagnosis, out)
    return 0


def _print(diagnosis: Diagnosis, out: Output) -> None:
    for line in diagnosis.ranks:
        out.say(line)
    for rank in diagnosis.missing_ranks:
        out.say(f"rank {rank} wrote no dump")
    for group in diagnosis.groups:
        out.say()
        out.say(f"group {group.name}, ranks {', '.join(map(str, group.ranks))}")
        out.say(f"  completed by all that dumped: {group.completed_by_all}")
        for finding in group.findings:
            out.say(f"  {finding}")
    _section(out, "messages", diagnosis.messages)
    _section(out, "failures", diagnosis.failures)
    out.say()
    out.say(f"Verdict: {diagnosis.verdict}")


def _section(out: Output, title: str, lines: tuple[str, ...]) -> None:
    if lines:
        out.say()
        out.say(title)
    for line in lines:
        out.say(f"  {line}")
