"""Strict JSON for records: atomic files, and non-finite numbers as the words NaN, Infinity and -Infinity.

JSON has no token for them, and other programs refuse Python's; a diverged loss must stay readable everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_jsonable(value: Any) -> Any:
    """`value` out of JSON's own types; what has no counterpart (a class, a function) becomes its `repr`."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _word(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [to_jsonable(item) for item in items]
    return _leaf(value)


def _leaf(value: Any) -> Any:
    if isinstance(value, Enum):
        return to_jsonable(value.value)
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # tensors and numpy scalars
        return to_jsonable(value.item())
    return repr(value)


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def number(value: Any) -> float | None:
    """The number that a record's field stands for, non-finite words included; None when it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return _NON_FINITE.get(value) if isinstance(value, str) else None


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON text of `value`, after `to_jsonable`."""
    return json.dumps(to_jsonable(value), indent=indent, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader sees the old text or the new, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # surrogateescape: the diff of a file that is not UTF-8 comes out byte for byte as it came in
    with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file by the indented JSON text of `value`, in one step."""
    write_text(path, dumps(value, indent=2) + "\n")
