"""Saving and loading: everything comes back, on one rank and on several, and only into the model it came
from.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from mlsys_engine import checkpoint
from mlsys_engine.checkpoint import folder, writing
from mlsys_engine.errors import CheckpointError
from tests.checkpoint.samples import assert_same, contents


def test_everything_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 20, contents(3.5), plan_hash="abc")
    loaded = checkpoint.load(path, contents(0.0))
    assert path.name == "step-00000020"
    assert_same(loaded.contents, contents(3.5))
    assert (loaded.marker.step, loaded.marker.plan_hash, loaded.marker.world_size) == (20, "abc", 1)


def test_the_template_tensors_are_filled_in_place(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(3.5), plan_hash="")
    template = contents(0.0)
    loaded = checkpoint.load(path, template)
    assert loaded.contents.model["layer.weight"] is template.model["layer.weight"]


def test_optimizer_state_that_the_template_lacks_is_loaded_all_the_same(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(3.5), plan_hash="")
    loaded = checkpoint.load(path, contents(0.0, with_state=False))
    assert_same(loaded.contents, contents(3.5))


def test_optimizer_state_that_the_checkpoint_lacks_is_left_out(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(3.5, with_state=False), plan_hash="")
    assert checkpoint.load(path, contents(0.0)).contents.optimizer_state == {}


def test_the_marker_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, contents(1.0), plan_hash="abc")
    fields = json.loads((path / "complete.json").read_text())
    assert fields["schema_version"] == 1
    assert set(fields["files"]) | {"complete.json"} == {entry.name for entry in path.iterdir()}
    assert all(len(record["sha256"]) == 64 for record in fields["files"].values())


def test_nothing_but_the_checkpoint_is_left_in_the_directory(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, contents(1.0), plan_hash="")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000007"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, contents(1.0), plan_hash="")
    path = checkpoint.save(tmp_path, 7, contents(2.0), plan_hash="")
    assert_same(checkpoint.load(path, contents(0.0)).contents, contents(2.0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000007"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, contents(1.0), plan_hash="", keep_last=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_directory_that_cannot_be_written_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints.*rank 0 creates"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, contents(1.0), plan_hash="")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer.bias", torch.zeros(5), r"'layer.bias' is float32\[4\] in the checkpoint and float32\[5\]"),
        ("half", torch.zeros(5).double(), r"'half' is bfloat16\[5\] in the checkpoint and float64\[5\]"),
        ("other", torch.zeros(1), r"the model has 'other', which the checkpoint lacks"),
    ],
)
def test_another_model_is_refused_by_its_first_difference(
    tmp_path: Path, name: str, value: torch.Tensor, message: str
) -> None:
    path = checkpoint.save(tmp_path, 1, contents(1.0), plan_hash="")
    template = contents(0.0)
    template = dataclasses.replace(template, model={**template.model, name: value})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path, template)


def test_a_parameter_that_the_model_lacks_is_refused_by_name(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(1.0), plan_hash="")
    template = contents(0.0)
    model = {name: value for name, value in template.model.items() if name != "half"}
    with pytest.raises(CheckpointError, match="the checkpoint has 'half', which the model lacks"):
        checkpoint.load(path, dataclasses.replace(template, model=model))


def test_a_model_in_another_precision_gets_what_was_saved_in_the_type_it_was_saved_in(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(1.0), plan_hash="")
    template = contents(0.0)
    template = dataclasses.replace(template, model={**template.model, "half": torch.zeros(5)})
    loaded = checkpoint.load(path, template).contents.model["half"]
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, contents(1.0).model["half"])
    assert torch.equal(template.model["half"], torch.zeros(5))  # converting is the runner's


def test_the_model_is_untouched_when_another_one_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(1.0), plan_hash="")
    template = contents(0.0)
    broken = dataclasses.replace(template, model={**template.model, "half": torch.zeros(6)})
    with pytest.raises(CheckpointError):
        checkpoint.load(path, broken)
    assert torch.equal(broken.model["layer.weight"], contents(0.0).model["layer.weight"])


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(1.0), plan_hash="")
    template = dataclasses.replace(
        contents(0.0),
        optimizer_groups=[{"lr": 1.0, "momentum": 0.9, "params": ["layer.weight", "layer.bias"]}],
    )
    with pytest.raises(CheckpointError, match="another optimizer: it does not set momentum"):
        checkpoint.load(path, template)


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, contents(1.0), plan_hash="")
    groups = [{"lr": 1.0, "betas": (0.9, 0.99), "params": [name]} for name in ("layer.weight", "layer.bias")]
    with pytest.raises(CheckpointError, match="groups with other parameters"):
        checkpoint.load(path, dataclasses.replace(contents(0.0), optimizer_groups=groups))


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        checkpoint.load(tmp_path / "step-00000001", contents(0.0))


def _save_and_load(rank: int, world_size: int, directory: str) -> None:
    mine = contents(2.5, rank=rank)
    path = checkpoint.save(directory, 5, mine, plan_hash="abc")
    assert_same(checkpoint.load(path, contents(0.0, rank=rank)).contents, mine)


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_gets_its_own_part_back(tmp_path: Path, run_ranks, world_size: int) -> None:
    run_ranks(_save_and_load, world_size, str(tmp_path))
    assert checkpoint.verify(tmp_path / "step-00000005").world_size == world_size


def _load_elsewhere(rank: int, world_size: int, path: str) -> bool:
    loaded = checkpoint.load(path, contents(0.0, rank=rank))
    expected = contents(2.5)
    assert torch.equal(loaded.contents.model["layer.weight"], expected.model["layer.weight"])
    assert loaded.contents.optimizer_groups == expected.optimizer_groups
    return bool(loaded.contents.own)


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_gets_everything_but_the_ranks_own_parts(
    tmp_path: Path, run_ranks, world_size: int
) -> None:
    run_ranks(_save_and_load, 2, str(tmp_path))
    path = tmp_path / "step-00000005"
    assert run_ranks(_load_elsewhere, world_size, str(path)) == [False] * world_size


def _die_while_saving(rank: int, world_size: int, directory: str) -> None:
    checkpoint.save(directory, 1, contents(1.0, rank=rank), plan_hash="")
    if rank == world_size - 1:
        writing.record_file = lambda path: os._exit(
            9
        )  # after its data are written, before the checkpoint is whole
    checkpoint.save(directory, 2, contents(2.0, rank=rank), plan_hash="")


def test_a_rank_that_dies_while_saving_leaves_the_former_checkpoint_whole(
    tmp_path: Path, run_ranks_collecting
) -> None:
    outcomes = run_ranks_collecting(_die_while_saving, 2, str(tmp_path))
    assert outcomes[1].exitcode == 9
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    assert checkpoint.verify(tmp_path / "step-00000001").step == 1


def test_what_an_interrupted_save_left_does_not_disturb_the_next(tmp_path: Path) -> None:
    leftover = folder.temporary_path(tmp_path, 3)
    leftover.mkdir(parents=True)
    (leftover / "__7_0.distcp").write_text("half")
    path = checkpoint.save(tmp_path, 3, contents(1.0), plan_hash="")
    assert sorted(entry.name for entry in path.iterdir()) == [".metadata", "__0_0.distcp", "complete.json"]
