"""A job over two network namespaces: hosts that cannot pass memory to each other, on a link of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "namespaces.py"
CANNOT = "namespaces.py cannot run here: "


@pytest.mark.slow
def test_a_job_over_two_namespaces_shares_memory_in_each_and_the_wire_between_them(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(SCRIPT), "--mib", "1", "--seconds", "0.5", "--json", str(record)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    if done.returncode and CANNOT in done.stderr:
        pytest.skip(done.stderr.strip().rpartition(CANNOT)[2])
    assert done.returncode == 0, done.stderr
    told = json.loads(record.read_text())
    assert told["transports"].startswith("ranks 0 1 in shared memory")
    assert " | ranks 2 3 in shared memory" in told["transports"]
    # Rank 0 sends its half of the tensor once for each all-reduce of ours; every result was checked.
    calls = 2 * (told["case"]["rounds"] + 1)
    assert told["counters"]["tcp_bytes_sent"] >= calls * told["case"]["bytes"] // 2
    assert told["counters"]["shm_bytes"] > 0
    left = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert "mlsys-" not in left
