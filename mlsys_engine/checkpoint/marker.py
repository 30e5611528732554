"""`complete.json`: the last file written into a checkpoint, and what all the others are checked against."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlsys_engine.errors import CheckpointError

MARKER_NAME = "complete.json"
SCHEMA_VERSION = 1
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a checkpoint as it was when written."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What a complete checkpoint says about itself."""

    schema_version: int
    step: int
    plan_hash: str
    world_size: int
    files: Mapping[str, FileRecord]


def record_file(path: Path) -> FileRecord:
    """The hash and size of a file as it is now."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
        return FileRecord(sha256=digest.hexdigest(), num_bytes=stream.tell())


def write_marker(directory: Path, marker: Marker) -> None:
    """Writes and fsyncs the marker of a checkpoint whose other files are on disk already."""
    with (directory / MARKER_NAME).open("w", encoding="utf-8") as stream:
        json.dump(asdict(marker), stream, indent=2, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_marker(directory: Path) -> Marker:
    """The marker of a checkpoint. Raises CheckpointError when it is missing, garbled or of another schema."""
    if not directory.is_dir():
        raise CheckpointError(
            f"There is no checkpoint at {directory}.",
            "A checkpoint is a directory such as runs/<id>/checkpoints/step-00000020.",
            "Check the path, or start without resume=.",
        )
    path = directory / MARKER_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(directory, f"its {MARKER_NAME} cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise _damaged(directory, f"its {MARKER_NAME} is not JSON") from None
    return _parse_marker(directory, fields)


def _parse_marker(directory: Path, fields: Any) -> Marker:
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"The checkpoint {directory} says schema_version {version!r} in {MARKER_NAME}.",
            f"This version of mlsys_engine reads schema_version {SCHEMA_VERSION}.",
            "Resume with the version that wrote it, or from another checkpoint.",
        )
    try:
        files = {str(name): FileRecord(**record) for name, record in fields["files"].items()}
        return Marker(
            schema_version=version,
            step=int(fields["step"]),
            plan_hash=str(fields["plan_hash"]),
            world_size=int(fields["world_size"]),
            files=files,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(directory, f"its {MARKER_NAME} lacks or garbles {error}") from None


def check_files(directory: Path, marker: Marker, names: Iterable[str]) -> None:
    """Compares the named files with the marker. Raises CheckpointError naming the first that differs."""
    for name in names:
        path, expected = directory / name, marker.files[name]
        try:
            num_bytes = path.stat().st_size
            if num_bytes != expected.num_bytes:
                raise _damaged(
                    directory, f"file {name} has {num_bytes} bytes where {expected.num_bytes} were written"
                )
            if record_file(path).sha256 != expected.sha256:
                raise _damaged(
                    directory, f"the content of file {name} is not what was written (sha256 differs)"
                )
        except FileNotFoundError:
            raise _damaged(directory, f"file {name} is missing") from None
        except OSError as error:
            raise _damaged(directory, f"file {name} cannot be read ({error.strerror or error})") from None


def verify(directory: Path) -> Marker:
    """Reads the marker and checks every file of one checkpoint on this rank alone."""
    marker = read_marker(directory)
    check_files(directory, marker, sorted(marker.files))
    return marker


def _damaged(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {directory} is damaged: {what}.",
        "Every file must be as it was when the checkpoint was completed.",
        "Restore it from a copy, or resume from another checkpoint.",
    )
