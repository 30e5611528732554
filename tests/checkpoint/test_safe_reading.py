"""A checkpoint cannot run code, not even one whose hashes are right."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from mlsys_engine import checkpoint
from mlsys_engine.checkpoint import marker, safe_reading
from mlsys_engine.checkpoint.plain_values import loads_safely
from mlsys_engine.errors import CheckpointError
from tests.checkpoint.samples import contents


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _rehash(path: Path) -> None:
    old = marker.read_marker(path)
    files = {name: marker.record_file(path / name) for name in old.files}
    marker.write_marker(
        path,
        marker.Marker(schema_version=1, step=old.step, plan_hash="", world_size=old.world_size, files=files),
    )


def test_a_metadata_file_that_names_other_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "c", 1, contents(1.0), plan_hash="")
    (path / ".metadata").write_bytes(pickle.dumps(_Malicious(tmp_path / "ran")))
    _rehash(path)
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        checkpoint.load(path, contents(0.0))
    assert not (tmp_path / "ran").exists()


class _Attribute:
    def __init__(self, owner: Any, name: str) -> None:
        self.of = (owner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.of


def test_members_of_enumerations_come_back_however_python_pickled_them() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for pickled in (member, _Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")):
        unpickler = safe_reading._MetadataUnpickler(io.BytesIO(pickle.dumps(pickled)))
        assert unpickler.load() is member


def test_no_other_attribute_can_be_asked_for() -> None:
    for owner, name in ((_MEM_FORMAT_ENCODING, "__class__"), (Metadata, "__init__")):
        unpickler = safe_reading._MetadataUnpickler(io.BytesIO(pickle.dumps(_Attribute(owner, name))))
        with pytest.raises(pickle.UnpicklingError, match="asks for the attribute"):
            unpickler.load()


def test_values_are_loaded_as_weights_only(tmp_path: Path) -> None:
    sample = contents(1.0)
    path = checkpoint.save(tmp_path / "c", 1, sample, plan_hash="")
    torch_bytes = tmp_path / "malicious"
    torch.save(_Malicious(tmp_path / "ran"), torch_bytes)
    planner = safe_reading.SafeLoadPlanner()
    with torch_bytes.open("rb") as stream, pytest.raises(pickle.UnpicklingError, match="weights_only"):
        planner.load_bytes(None, stream)
    assert not (tmp_path / "ran").exists()
    assert path.exists()


@pytest.mark.parametrize(
    ("value", "safe"),
    [
        ({"a": [1, 2.0, None, ("x", True)], "t": torch.ones(2)}, True),
        ({}, True),
        (_Malicious(Path("x")), False),
    ],
)
def test_what_loads_safely_is_known_before_it_is_saved(value: object, safe: bool, tmp_path: Path) -> None:
    assert loads_safely(value) is safe


def test_a_function_does_not_load_safely() -> None:
    assert not loads_safely({"f": len})
    assert not loads_safely({"f": lambda: 0})
