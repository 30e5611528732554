"""Token files: exact round trips, and every kind of damage named before training."""

from __future__ import annotations

import hashlib
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.data import TokenFile, write_token_file
from mlsys_engine.data.token_file import HEADER_BYTES
from mlsys_engine.errors import DataError


@pytest.mark.parametrize(("dtype", "highest"), [(np.uint16, 2**16 - 1), (np.uint32, 2**32 - 1)])
def test_the_extremes_of_each_dtype_come_back(tmp_path, dtype, highest):
    file = write_token_file(tmp_path / "tokens.bin", [0, 1, highest], dtype)
    assert file.dtype == dtype
    assert file[:].tolist() == [0, 1, highest]
    assert len(file) == 3


@given(st.lists(st.integers(0, 2**16 - 1), max_size=50))
def test_any_tokens_come_back(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    file = write_token_file(path, np.array(tokens, dtype=np.int64))
    assert file[:].tolist() == tokens
    assert file.sha256 == hashlib.sha256(np.array(tokens, dtype="<u2").tobytes()).hexdigest()
    file.verify()


def test_a_file_without_tokens_can_be_opened(tmp_path):
    assert len(write_token_file(tmp_path / "none.bin", [])) == 0


def test_tokens_are_mapped_and_not_read(tmp_path):
    assert isinstance(write_token_file(tmp_path / "tokens.bin", range(10)).tokens, np.memmap)


def test_a_pickled_file_is_its_path(tmp_path):
    file = write_token_file(tmp_path / "tokens.bin", np.zeros(100_000, dtype=np.uint16))
    pickled = pickle.dumps(file)
    assert len(pickled) < 1000
    assert len(pickle.loads(pickled)) == 100_000


def test_writing_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    old = write_token_file(tmp_path / "tokens.bin", [1, 2])
    write_token_file(tmp_path / "tokens.bin", [3])
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"]
    assert old[:].tolist() == [1, 2]  # whoever had it open keeps what they read
    assert TokenFile(tmp_path / "tokens.bin")[:].tolist() == [3]


@pytest.mark.parametrize(
    ("tokens", "dtype", "words"),
    [
        ([2**16], np.uint16, "uint16 holds 0 to 65535"),
        ([-1], np.uint32, "Tokens from -1"),
        ([1], np.int64, "uint16 or uint32"),
        ([1], np.uint8, "uint16 or uint32"),
        ([[1, 2]], np.uint16, r"shape \(1, 2\)"),
        ([1.5], np.uint16, "float64"),
    ],
)
def test_tokens_that_cannot_be_stored_are_refused_before_a_file_appears(tmp_path, tokens, dtype, words):
    with pytest.raises(DataError, match=words):
        write_token_file(tmp_path / "tokens.bin", tokens, dtype)
    assert not list(tmp_path.iterdir())


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.bin does not exist"):
        TokenFile(tmp_path / "nothing.bin")


def test_a_folder_is_not_a_token_file(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        TokenFile(tmp_path)


def change(at: int, replacement: bytes):
    return lambda content: content[:at] + replacement + content[at + len(replacement) :]


DAMAGE = {
    "empty": (lambda content: b"", "is not a token file"),
    "cut inside the header": (lambda content: content[: HEADER_BYTES - 1], "is not a token file"),
    "of another kind": (lambda content: b"\x89PNG" + content[4:], "is not a token file"),
    "of a later version": (change(8, struct.pack("<I", 2)), "version 2"),
    "of another token size": (change(12, struct.pack("<I", 3)), "3 bytes a token"),
    "short of a byte": (lambda content: content[:-1], "has 69 bytes where its header"),
    "short of a token": (lambda content: content[:-2], "has 68 bytes where its header"),
    "longer than announced": (lambda content: content + b"\0\0", "has 72 bytes"),
    "announcing an absurd length": (change(16, struct.pack("<Q", 2**63)), "header"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, name):
    damage, words = DAMAGE[name]
    path = tmp_path / "tokens.bin"
    write_token_file(path, [1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        TokenFile(path)


def test_a_flipped_bit_is_found_when_asked(tmp_path):
    path = tmp_path / "tokens.bin"
    write_token_file(path, [1, 2, 3])
    path.write_bytes(change(HEADER_BYTES, b"\xff")(path.read_bytes()))
    with pytest.raises(DataError, match="sha256"):
        TokenFile(path).verify()
