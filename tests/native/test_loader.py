"""The loader refuses a build that is missing, stale or of another torch, and says what to type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlsys_engine.errors import NativeBuildError
from mlsys_engine.native import loader
from mlsys_engine.native.source_hash import hash_sources


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that stands for a checkout with a good build; the record is tmp_path/native/_build.json."""
    csrc, native = tmp_path / "csrc", tmp_path / "native"
    (csrc / "core").mkdir(parents=True)
    native.mkdir()
    (csrc / "core" / "a.h").write_text("#pragma once\n")
    record = {
        "torch": torch.__version__,
        "torch_cuda": None,
        "cuda_kernels": False,
        "source_hash": hash_sources(csrc),
        "built": "2024-01-01T00:00:00+00:00",
    }
    (native / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(loader, "CSRC", csrc)
    monkeypatch.setattr(loader, "NATIVE", native)
    loader.build_info.cache_clear()
    yield tmp_path
    loader.build_info.cache_clear()


def _change_record(build: Path, **changes: object) -> None:
    path = build / "native" / "_build.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_build_is_described(build: Path) -> None:
    assert loader.build_info().torch == torch.__version__


def test_a_missing_build_says_what_to_type(build: Path) -> None:
    (build / "native" / "_build.json").unlink()
    with pytest.raises(NativeBuildError, match=r"are not built.*Type: .*scripts/build"):
        loader.build_info()


def test_a_build_for_another_minor_of_torch_says_what_to_type(build: Path) -> None:
    _change_record(build, torch="1.13.1")
    with pytest.raises(NativeBuildError, match=r"built for torch 1\.13\.1.*Type: .*scripts/build"):
        loader.build_info()


def test_another_patch_release_of_the_same_torch_is_accepted(build: Path) -> None:
    major, minor, _ = torch.__version__.split(".", 2)
    _change_record(build, torch=f"{major}.{minor}.99")
    assert loader.build_info().torch.endswith(".99")


def test_a_changed_source_makes_the_build_stale(build: Path) -> None:
    (build / "csrc" / "core" / "a.h").write_text("#pragma once\n// changed\n")
    with pytest.raises(NativeBuildError, match=r"changed after.*Type: .*scripts/build"):
        loader.build_info()


def test_a_new_source_makes_the_build_stale(build: Path) -> None:
    (build / "csrc" / "core" / "b.cu").write_text("\n")
    with pytest.raises(NativeBuildError, match="changed after"):
        loader.build_info()


def test_files_that_are_not_compiled_do_not_make_the_build_stale(build: Path) -> None:
    (build / "csrc" / "core" / "notes.md").write_text("words\n")
    loader.build_info()


def test_an_installed_package_without_sources_is_not_stale(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "CSRC", build / "nowhere")
    loader.build_info()


def test_a_lost_library_says_what_to_type(build: Path) -> None:
    with pytest.raises(NativeBuildError, match=r"_kernels\*\.so is missing.*Type: "):
        loader._library("_kernels")
