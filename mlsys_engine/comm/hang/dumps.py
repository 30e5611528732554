"""Reads the dumps of a folder as untrusted data.

The files are pickles, since torch's own tools read those. Ours loads them with an unpickler that refuses
every name of a class or function, so that a file can hold plain values only and cannot run anything.
"""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlsys_engine.errors import ConfigError

PREFIX = "hang_rank_"
_MAX_BYTES = 256 << 20  # a million entries with call sites


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One recorded operation of one rank."""

    group: str
    sequence: int  # among the group's collectives, or among this rank's messages in the group
    name: str
    is_message: bool
    source: int  # of a message, group rank; -1 for any source
    destination: int
    input_sizes: tuple[tuple[int, ...], ...]
    output_sizes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    state: str  # scheduled, started or completed
    created_ns: int
    started_ns: int | None
    completed_ns: int | None
    failure_kind: str  # "", timeout, mismatch, peer_failed or error
    failure: str
    call_site: str  # the innermost frame outside of communication code; empty without detail

    @property
    def completed(self) -> bool:
        """Whether it finished without a failure."""
        return self.state == "completed"


@dataclass(frozen=True, kw_only=True)
class Dump:
    """What one rank wrote."""

    rank: int
    world_size: int
    host: str
    pid: int
    time_ns: int
    reason: str
    groups: Mapping[str, tuple[int, ...]]  # name -> global ranks
    operations: tuple[Operation, ...]  # oldest first


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and a dump holds plain values only")


def read_dumps(directory: str | Path) -> list[Dump]:
    """Every rank's dump in `directory`, by rank. Raises ConfigError for a folder or file that is not one."""
    folder = Path(directory)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder.",
            f"The folder that MLSYS_HANG_DIR named, with files {PREFIX}0, {PREFIX}1 and so on, was expected.",
            "Set MLSYS_HANG_DIR when the job starts, or call mls.comm.dump(folder) on each rank.",
        )
    files = sorted(path for path in folder.iterdir() if re.fullmatch(PREFIX + r"\d+", path.name))
    if not files:
        raise ConfigError(
            f"{folder} holds no dump.",
            f"Files {PREFIX}0, {PREFIX}1 and so on were expected, one from each rank.",
            "Send SIGUSR2 to a rank of a job that runs with MLSYS_HANG_DIR, or wait for its timeout.",
        )
    return sorted((_read(path) for path in files), key=lambda dump: dump.rank)


def _read(path: Path) -> Dump:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
        return _parse(content)
    except Exception as error:  # the unpickler raises nearly anything on damaged input
        raise ConfigError(
            f"{path} cannot be read as a dump: {error}.",
            "A file that the recorder of mlsys_engine.comm wrote was expected.",
            "Remove it from the folder, or dump again.",
        ) from error


def _parse(content: Any) -> Dump:
    about = content["mlsys"]
    return Dump(
        rank=int(about["rank"]),
        world_size=int(about["world_size"]),
        host=str(about["host"]),
        pid=int(about["pid"]),
        time_ns=int(about["time_ns"]),
        reason=str(about["reason"]),
        groups={
            str(name): tuple(int(rank) for rank in ast.literal_eval(group["ranks"]))
            for name, group in content["pg_config"].items()
        },
        operations=tuple(_operation(entry) for entry in content["entries"]),
    )


def _operation(entry: Mapping[str, Any]) -> Operation:
    source, destination = _ends(str(entry["profiling_name"])) if entry["is_p2p"] else (-1, -1)
    return Operation(
        group=str(entry["process_group"][0]),
        sequence=int(entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]),
        name=str(entry["mlsys_operation"]),
        is_message=bool(entry["is_p2p"]),
        source=source,
        destination=destination,
        input_sizes=_sizes(entry["input_sizes"]),
        output_sizes=_sizes(entry["output_sizes"]),
        dtypes=tuple(str(dtype) for dtype in entry["input_dtypes"] or entry["output_dtypes"]),
        state=str(entry["state"]),
        created_ns=int(entry["time_created_ns"]),
        started_ns=_time(entry["time_discovered_started_ns"]),
        completed_ns=_time(entry["time_discovered_completed_ns"]),
        failure_kind=str(entry["mlsys_failure_kind"]),
        failure=str(entry["mlsys_failure"]),
        call_site=_call_site(entry.get("frames", ())),
    )


def _ends(title: str) -> tuple[int, int]:
    """Source and destination of "gloo:send 0->1" or "gloo:recv 1<-0"."""
    if match := re.search(r"(-?\d+)->(-?\d+)$", title):
        return int(match[1]), int(match[2])
    if match := re.search(r"(-?\d+)<-(-?\d+)$", title):
        return int(match[2]), int(match[1])
    raise ValueError(f"{title!r} names no source and destination")


def _sizes(sizes: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(dim) for dim in size) for size in sizes)


def _time(value: Any) -> int | None:
    return None if value is None else int(value)


def _call_site(frames: Any) -> str:
    ours = ("/torch/distributed/", "/torch/_", "/mlsys_engine/comm/")
    for frame in frames:
        if not any(part in frame["filename"] for part in ours):
            return f"{frame['filename']}:{frame['line']} in {frame['name']}"
    return ""
