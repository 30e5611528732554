"""Frozen dataclasses to plain JSON and back, strictly: an unknown or missing field is an error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from typing import Any, TypeVar

from mlsys_engine.errors import ConfigError

T = TypeVar("T")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with sorted keys; equal values give equal text."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(dataclasses.asdict(value), sort_keys=True, indent=indent, separators=separators)


def digest(value: Any) -> str:
    """16 hexadecimal digits that depend on the value alone: not on the process, machine or Python version."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:16]


def from_json(cls: type[T], text: str) -> T:
    """A value of the dataclass `cls` from `to_json`'s text; raises ConfigError naming what does not fit."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(cls, f"text that is not JSON ({error})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    expected = {field.name: field.default for field in dataclasses.fields(cls)}.get("schema_version")  # type: ignore[arg-type]
    if version != expected:
        raise ConfigError(
            f"A {cls.__name__} of schema version {version}.",
            f"This version of mlsys_engine reads schema version {expected}.",
            "Make it anew with this version, or read it with the version that wrote it.",
        )
    return _decode(cls, data, cls.__name__)


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _decode(kind, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise _damaged(kind, f"{data!r} at {where}")
        if arguments[-1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
        if len(data) != len(arguments):
            raise _damaged(kind, f"{data!r} at {where}")
        return tuple(_decode(part, item, where) for part, item in zip(arguments, data, strict=True))
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, data, where)
    if type(data) is not kind:  # bool is an int to isinstance, and must not pass for one
        raise _damaged(kind, f"{data!r} at {where}")
    return data


def _decode_fields(cls: Any, data: Any, where: str) -> Any:
    fields = typing.get_type_hints(cls)
    if not isinstance(data, dict) or data.keys() != fields.keys():
        found = sorted(data) if isinstance(data, dict) else data
        raise _damaged(cls, f"fields {found} at {where}")
    return cls(**{name: _decode(kind, data[name], f"{where}.{name}") for name, kind in fields.items()})


def _damaged(kind: Any, found: str) -> ConfigError:
    name = getattr(kind, "__name__", str(kind))
    return ConfigError(
        f"JSON with {found}.", f"It should be a {name} as to_json writes it.", "Write the file anew."
    )
