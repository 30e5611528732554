"""Damaged checkpoints of every kind are refused before training, each by name and with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlsys_engine import checkpoint
from mlsys_engine.errors import CheckpointError
from tests.checkpoint.samples import contents

DATA = "__0_0.distcp"


def _flip_a_bit(path: Path) -> None:
    content = bytearray((path / DATA).read_bytes())
    content[len(content) // 2] ^= 1
    (path / DATA).write_bytes(content)


def _truncate(path: Path) -> None:
    content = (path / DATA).read_bytes()
    (path / DATA).write_bytes(content[: len(content) // 2])


def _empty_the_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(b"")


def _edit_marker(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        fields = json.loads((path / "complete.json").read_text())
        (path / "complete.json").write_text(json.dumps({**fields, **changes}))

    return edit


DAMAGES = {
    "a flipped bit": (_flip_a_bit, f"content of file {DATA} is not what was written"),
    "a truncated file": (_truncate, f"file {DATA} has [0-9]+ bytes where [0-9]+ were written"),
    "a missing file": (lambda path: (path / DATA).unlink(), f"file {DATA} is missing"),
    "an empty metadata file": (_empty_the_metadata, "file .metadata has 0 bytes"),
    "a missing marker": (lambda path: (path / "complete.json").unlink(), "complete.json cannot be read"),
    "a truncated marker": (
        lambda path: (path / "complete.json").write_text('{"st'),
        "complete.json is not JSON",
    ),
    "a marker of a list": (lambda path: (path / "complete.json").write_text("[]"), "schema_version None"),
    "a marker without files": (_edit_marker(files=None), "complete.json lacks or garbles"),
    "a marker of a later version": (_edit_marker(schema_version=99), "says schema_version 99"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGES[kind]
    path = checkpoint.save(tmp_path, 20, contents(1.0), plan_hash="")
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path, contents(0.0))
    assert str(path) in str(caught.value)
    assert caught.value.expected
    assert caught.value.action


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_older_checkpoint_that_is_whole_is_named_as_the_way_out(tmp_path: Path, kind: str) -> None:
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, contents(1.0), plan_hash="", keep_last=9)
    for step in (15, 20):
        DAMAGES[kind][0](tmp_path / f"step-{step:08d}")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000020"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "step-00000020", contents(0.0))
    whole = tmp_path / "step-00000010"
    assert caught.value.action == (
        f"{whole} is whole: delete the damaged folder to go on from it, or pass resume='{whole}'."
    )


def _load_expecting_refusal(rank: int, world_size: int, path: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, contents(0.0))
    return str(caught.value)


def test_all_ranks_refuse_with_the_same_words_although_each_checks_its_own_files(
    tmp_path: Path, run_ranks
) -> None:
    path = checkpoint.save(tmp_path, 20, contents(1.0), plan_hash="")
    _flip_a_bit(path)
    messages = run_ranks(_load_expecting_refusal, 3, str(path))
    assert len(set(messages)) == 1
    assert DATA in messages[0]
