"""The standard library as a corpus: split by file, stable, and the same for the same files."""

from __future__ import annotations

import hashlib

import pytest

from mlsys_engine.data import stdlib_corpus
from mlsys_engine.errors import DataError


def write_library(folder, num_files=60):
    for number in range(num_files):
        path = folder / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"# file {number}\r\n".encode() * 5)


def test_this_pythons_library_gives_megabytes_for_both_parts():
    corpus = stdlib_corpus()
    assert len(corpus.train) > 5_000_000
    assert 0.03 < len(corpus.validation) / len(corpus.train) < 0.4
    assert "standard library of Python 3" in corpus.description


def test_every_file_is_in_one_part_and_both_parts_make_up_the_library(tmp_path):
    write_library(tmp_path)
    corpus = stdlib_corpus(root=tmp_path)
    train, validation = corpus.train.tobytes(), corpus.validation.tobytes()
    for number in range(60):
        line = f"# file {number}\r\n".encode()
        assert (line in train) != (line in validation)
    assert len(train) + len(validation) == sum(path.stat().st_size for path in tmp_path.rglob("*.py"))
    assert corpus.num_files == 60


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path):
    write_library(tmp_path)
    before = stdlib_corpus(root=tmp_path).validation.tobytes()
    (tmp_path / "package0" / "added.py").write_text("added = 1\n")
    for path in (tmp_path / "package1").iterdir():
        path.unlink()
    after = stdlib_corpus(root=tmp_path).validation.tobytes()
    kept = [line for line in after.splitlines() if line != b"added = 1"]
    assert kept
    assert all(line in before for line in kept)


def test_the_fingerprint_follows_the_content(tmp_path):
    write_library(tmp_path)
    first, again = stdlib_corpus(root=tmp_path), stdlib_corpus(root=tmp_path)
    assert first.fingerprint == again.fingerprint
    digest = hashlib.sha256(f"{len(first.train)}:".encode() + first.train.tobytes())
    digest.update(first.validation.tobytes())
    assert first.fingerprint == digest.hexdigest()
    (tmp_path / "package0" / "module0.py").write_text("changed")
    assert stdlib_corpus(root=tmp_path).fingerprint != first.fingerprint


def test_what_is_installed_or_made_on_the_machine_is_left_out(tmp_path):
    write_library(tmp_path)
    names = ["site-packages/a.py", "__pycache__/b.py", "config-3.11-x/c.py", "_sysconfigdata_x.py", "d.txt"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not the library")
    assert stdlib_corpus(root=tmp_path).num_files == 60


def test_max_bytes_limits_both_parts_together():
    small, larger = stdlib_corpus(1_000_000), stdlib_corpus(3_000_000)
    assert len(small.train) + len(small.validation) == 1_000_000
    assert larger.train.tobytes().startswith(small.train.tobytes()[:500_000])
    assert len(small.validation) == 100_000


@pytest.mark.parametrize("max_bytes", [None, 0])
def test_a_folder_without_text_is_refused(tmp_path, max_bytes):
    with pytest.raises(DataError, match="0 bytes to train on"):
        stdlib_corpus(max_bytes, root=tmp_path)
