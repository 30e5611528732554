from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mlsys_engine.tracking import json_files


@dataclass(frozen=True)
class _Settings:
    width: int
    folder: Path


def test_every_kind_of_setting_becomes_strict_json() -> None:
    value = {
        "settings": _Settings(3, Path("a/b")),
        "tensor": torch.tensor(2.5),
        "numpy": np.int64(7),
        "set": {2, 1},
        "tuple": (1, None, True),
    }
    assert json.loads(json_files.dumps(value)) == {
        "settings": {"width": 3, "folder": "a/b"},
        "tensor": 2.5,
        "numpy": 7,
        "set": [1, 2],
        "tuple": [1, None, True],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_survive_the_round_trip_as_words(value: float) -> None:
    text = json_files.dumps({"loss": value})
    word = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))["loss"]
    back = json_files.number(word)
    assert isinstance(word, str) and back is not None
    assert math.isnan(back) if math.isnan(value) else back == value


def test_other_words_and_truth_values_are_no_numbers() -> None:
    assert json_files.number("fast") is None
    assert json_files.number(True) is None
    assert json_files.number(None) is None


def test_a_file_is_replaced_in_one_step_and_leaves_no_temporary(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    json_files.write_json(file, {"a": 1})
    json_files.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_text_that_is_not_utf8_is_written_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "code.diff"
    json_files.write_text(file, b"caf\xe9\r\n".decode("utf-8", "surrogateescape"))
    assert file.read_bytes() == b"caf\xe9\r\n"
