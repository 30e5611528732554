from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsys_engine import checkpoint
from mlsys_engine.cli.train_command import DEFAULT_RANKS, TrainCommand, parse, pin_resumed
from mlsys_engine.errors import CheckpointError, ConfigError, LaunchError
from mlsys_engine.recipes import recipe_class, recorded_settings
from mlsys_engine.tracking import json_files

_TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_no_arguments_mean_the_default_recipe() -> None:
    command = parse([])
    assert command.recipe_name == "gpt-bytes" and command.recipe == recipe_class("gpt-bytes")()


@pytest.mark.parametrize(
    "arguments",
    [
        ["gpt-bytes", "--steps", "7", "--model.width", "64", "--ranks", "3"],
        ["--ranks", "3", "gpt-bytes", "--steps", "7", "--model.width", "64"],
        ["--steps=7", "--model.width=64", "--ranks=3"],
    ],
)
def test_overrides_are_typed_and_the_recipe_may_stand_anywhere(arguments: list[str]) -> None:
    command = parse(arguments)
    recipe: Any = command.recipe
    assert (recipe.training.steps, recipe.model.width, command.options.ranks) == (7, 64, 3)


def test_an_unknown_option_leaves_with_status_2_and_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        parse(["gpt-bytes", "--stepz", "7"])
    assert leave.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["seven", "7.5", ""])
def test_a_value_of_another_type_leaves_with_status_2(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        parse(["--steps", value])
    assert leave.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_ranks_are_two_also_on_a_host_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # ranks compute on the CPU in this version
    assert parse([]).num_ranks({}) == DEFAULT_RANKS == 2
    assert parse(["--ranks", "3"]).num_ranks({}) == 3


def test_under_a_launcher_its_world_size_counts() -> None:
    assert parse([]).num_ranks(_TORCHRUN) == 4
    assert parse(["--ranks", "4"]).num_ranks(_TORCHRUN) == 4
    with pytest.raises(LaunchError, match=r"--ranks 2, but the launcher started 4\. .* Leave out --ranks"):
        parse(["--ranks", "2"]).num_ranks(_TORCHRUN)


@pytest.mark.parametrize("ranks", [0, -1])
def test_fewer_than_one_rank_is_refused(ranks: int) -> None:
    with pytest.raises(LaunchError, match=f"--ranks {ranks}"):
        parse(["--ranks", str(ranks)]).num_ranks({})


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded run of gpt-bytes on 3 ranks with 11 steps that has a checkpoint."""
    recipe: Any = parse(["--steps", "11", "--model.width", "64"]).recipe
    folder = tmp_path / "runs" / "20260101-000000-000-aaaa"
    folder.mkdir(parents=True)
    record = {"id": folder.name, "status": "interrupted", "created": "2026", "world_size": 3}
    record["manifest"] = {"config": recorded_settings("gpt-bytes", recipe)}
    (folder / "run.json").write_text(json_files.dumps(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "latest", lambda path: path / "step-00000005")
    return folder


def test_resuming_takes_settings_and_ranks_from_the_record_and_overrides_from_the_command(
    run_folder: Path,
) -> None:
    command = parse(["--resume", "latest", "--seed", "3"])
    recipe: Any = command.recipe
    assert (recipe.training.steps, recipe.model.width, recipe.training.seed) == (11, 64, 3)
    assert command.run_dir == run_folder and command.num_ranks({}) == 3
    assert parse(["--resume", "2026", "--ranks", "2"]).num_ranks({}) == 2


@pytest.mark.parametrize(
    "arguments", [["--resume", "latest", "--seed", "3"], ["--resume=latest", "--seed", "3"]]
)
def test_ranks_are_told_the_folder_and_do_not_look_for_latest_themselves(
    run_folder: Path, arguments: list[str]
) -> None:
    pinned = pin_resumed(arguments, parse(arguments))
    assert not any("latest" in word for word in pinned)
    assert parse(pinned).run_dir == run_folder
    fresh = ["--steps", "3"]
    assert pin_resumed(fresh, parse(fresh)) == fresh


def test_resuming_contradictions_are_refused(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="That run was trained by 'gpt-bytes'"):
        parse(["gpt-file", "--resume", "latest"])
    with pytest.raises(ConfigError, match="Both name the folder of the run"):
        parse(["--resume", "latest", "--run-dir", "elsewhere"])
    with pytest.raises(ConfigError, match="There is no run 'nope'"):
        parse(["--resume", "nope"])


def test_resuming_a_run_without_a_checkpoint_is_refused(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "latest", lambda path: None)
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        parse(["--resume", "latest"])


def test_help_is_shown_also_when_resuming(run_folder: Path) -> None:
    with pytest.raises(SystemExit) as leave:
        parse(["--resume", "latest", "--help"])
    assert leave.value.code == 0


def test_a_run_of_a_script_is_not_resumed_by_the_command(run_folder: Path) -> None:
    fields = json.loads((run_folder / "run.json").read_text())
    fields["manifest"]["config"] = {"trainer": {}}
    (run_folder / "run.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="Resume it with the script that started it"):
        parse(["--resume", "latest"])


def test_a_command_is_a_value() -> None:
    assert parse(["--steps", "7"]) == parse(["--steps=7"])
    assert isinstance(parse([]), TrainCommand)
