from __future__ import annotations

import json
import math
from pathlib import Path

from mlsys_engine.tracking import MetricsLog, read_metrics


def test_each_line_is_readable_as_soon_as_it_was_appended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        log.append(step, {"loss": 1.0 / step})
        rows = read_metrics(tmp_path / "metrics.jsonl").rows
        assert [row["step"] for row in rows] == list(range(1, step + 1))
    log.close()
    log.close()


def test_a_loss_that_is_not_a_number_is_kept_as_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss": math.nan})
    log.append(2, {"loss": math.inf})
    log.close()
    (_, first), (_, second) = read_metrics(tmp_path / "metrics.jsonl").series("loss")
    assert math.isnan(first) and second == math.inf


def test_torn_and_foreign_lines_are_left_out_and_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": 2.0}', b"[1, 2]", b'{"loss": 3.0}', b"\xff\xfe", b"", b'{"step": 2, "lo']
    file.write_bytes(b"\n".join(lines))
    table = read_metrics(file)
    assert [row["step"] for row in table.rows] == [1]
    assert [problem.split(" is not")[0] for problem in table.problems] == [
        f"metrics.jsonl line {number}" for number in (2, 3, 4, 5)
    ]


def test_a_missing_file_reads_as_an_empty_table(tmp_path: Path) -> None:
    table = read_metrics(tmp_path / "nothing.jsonl")
    assert table.rows == () and table.problems == () and table.last_step == 0


def test_opening_without_a_step_to_keep_starts_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n')
    MetricsLog(file).close()
    assert file.read_text() == ""


def test_resuming_drops_lines_past_the_step_and_the_torn_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    kept = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3)]
    file.write_text("\n".join([*kept, '{"step": 4, "loss": 0.4}', '{"step": 5, "lo']))
    log = MetricsLog(file, keep_to_step=3)
    log.append(4, {"loss": 0.25})
    log.close()
    assert read_metrics(file).series("loss") == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)]
    assert file.read_text().splitlines()[:3] == kept
