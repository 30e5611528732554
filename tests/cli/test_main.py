from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlsys_engine import __version__
from mlsys_engine.cli import main as cli
from mlsys_engine.errors import ConfigError, NativeBuildError


def test_version_and_help_are_short_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlsys_engine {__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"mlsys {command.usage}" in text for command in cli.COMMANDS.values())
        assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_in_the_table_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"mlsys {name}" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def _failing(error: BaseException) -> object:
    def run(_: list[str]) -> int:
        raise error

    return run


def test_a_mistake_is_told_in_three_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ConfigError("Given this.", "Expected that.", "Do so.")
    monkeypatch.setattr(cli, "load_command", lambda name: _failing(error))
    assert cli.main(["train"]) == 2
    expected = "mlsys: Given this.\n       Expected that.\n       Do so.\n"
    assert capsys.readouterr().err == expected


def test_a_missing_build_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = NativeBuildError("Not built. Type: make")
    monkeypatch.setattr(cli, "load_command", lambda name: _failing(error))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "mlsys: Not built. Type: make\n"


def test_an_interrupt_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "load_command", lambda name: _failing(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_command", lambda name: _failing(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize(("local_rank", "tells"), [("0", True), ("1", False)])
def test_only_the_first_rank_of_a_host_tells_of_a_mistake_before_the_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, tells: bool
) -> None:
    variables = {"RANK": local_rank, "WORLD_SIZE": "2", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2"}
    for key, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(cli, "_LINGER_S", 0.0)
    assert cli.main(["trian"]) == 2
    assert bool(capsys.readouterr().err) is tells


def test_a_mistake_while_joining_is_told_by_the_rank_that_met_it(tmp_path: Path) -> None:
    """Only local rank 1 has a bad variable: the first rank of the host cannot tell of it."""
    code = "import sys; from mlsys_engine.cli.main import main; sys.exit(main(['train', '--steps', '1']))"
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "MLSYS_AFFINITY": "perhaps"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "MLSYS_AFFINITY='perhaps'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `mlsys --help | head -0`: the pipe's reader is gone before the command writes."""
    code = "import os, sys; from mlsys_engine.cli.main import main; os.read(0, 1); sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    os.close(reader)
    _, errors = process.communicate(b"x")
    assert (process.returncode, errors) == (0, b"")


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlsys_engine.cli", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "There is no command 'trian'." in done.stderr and "Traceback" not in done.stderr
