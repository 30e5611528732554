"""README's Python blocks run as they stand, and its commands name things that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlsys_engine.comm.launch import launch_local

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("index", range(len(_blocks("python"))))
def test_python_blocks_run_alone_and_on_two_ranks(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "example.py"
    program.write_text(_blocks("python")[index])
    monkeypatch.chdir(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(program)], check=True, env=env, timeout=300)
    assert launch_local([str(program)], 2, env={"PYTHONPATH": str(ROOT)}) == 0


def test_commands_name_files_that_exist() -> None:
    commands = "\n".join(_blocks("bash"))
    named = re.findall(r"(?:scripts|examples)/[\w./]+", commands + README)
    assert "scripts/quickstart" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_two_commands_come_first() -> None:
    assert _blocks("bash")[0].split() == ["scripts/quickstart", "scripts/test"]


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []
