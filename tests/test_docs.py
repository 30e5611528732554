"""The guides: their Python blocks run, each is listed, and no two notes share a number."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
_ONE_RANK = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
# What a page leaves to the reader.
_GIVEN = {"collectives": "import torch\nmodel = torch.nn.Linear(2, 2)"}


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_python_blocks_of_a_guide_run_one_after_the_other(guide: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE)
    program = tmp_path / "blocks.py"
    program.write_text("\n".join([_GIVEN.get(guide.stem, ""), *blocks]))
    env = {**os.environ, "PYTHONPATH": str(ROOT), **_ONE_RANK}
    subprocess.run([sys.executable, str(program)], check=True, env=env, cwd=tmp_path, timeout=300)


def test_every_guide_is_in_the_navigation_and_in_the_table() -> None:
    navigation, table = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs" / "index.md").read_text()
    assert [g.name for g in GUIDES if f"guide/{g.name}" not in navigation] == []
    assert [g.name for g in GUIDES if f"(guide/{g.name})" not in table] == []


def test_no_two_notes_share_a_number() -> None:
    numbers = Counter(note.name[:4] for note in (ROOT / "docs" / "notes").glob("*.md"))
    assert [number for number, times in numbers.items() if times > 1 or not number.isdigit()] == []


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*GUIDES, *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "notes").glob("*.md")]
    broken = [
        (page.name, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []
