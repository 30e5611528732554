"""torch's own DistributedTest suite passes on our backend, but for the tests listed in not_passing.txt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# How many pass at each world size; the rest of the suite is skipped by torch for want of CUDA or of NCCL.
PASSING = {2: 94, 4: 95}
# One test of each kind of operation and consumer, for every run of the default suite.
REPRESENTATIVE = (
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_complex",
    "test_all_reduce_coalesced_sum",
    "test_all_reduce_full_group_max",
    "test_all_reduce_product",
    "test_all_reduce_sum_async",
    "test_all_to_all_complex",
    "test_all_to_all_single_unequal_split",
    "test_barrier_timeout_full_group",
    "test_batch_isend_irecv_gloo_tags",
    "test_broadcast",
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_destroy_full_group",
    "test_gather_checks",
    "test_get_future",
    "test_isend_torch_profiler",
    "test_monitored_barrier_gloo_rank_0_timeout",
    "test_reduce_min",
    "test_scatter_object_list",
    "test_send_recv_any_source",
    "test_send_recv_with_tag_autograd_profiler",
    "test_sparse_all_reduce_sum",
    "test_all_to_all_full_group",
    "test_all_gather_full_group",
    "test_all_reduce_sum_complex",
)


class Outcomes(dict[str, str]):
    """What became of each test, and what the ranks wrote, which is where a crash tells its story."""

    def __init__(self, outcomes: dict[str, str], *, stderr: str) -> None:
        super().__init__(outcomes)
        self.stderr = stderr


def _run(tmp_path: Path, world_size: int, names: tuple[str, ...] = ()) -> Outcomes:
    environment = os.environ | {
        "BACKEND": "mlsys",
        "BACKEND_PLUGIN": "mlsys_engine.comm",
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "TEMP_DIR": str(tmp_path / "exchange"),
    }
    (tmp_path / "exchange").mkdir()
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.conformance.driver", "--results", str(results), *names]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert results.exists(), finished.stderr[-4000:]
    return Outcomes(json.loads(results.read_text()), stderr=finished.stderr)


def _listed(world_size: int) -> set[str]:
    lines = (HERE / "not_passing.txt").read_text().splitlines()
    fields = [[part.strip() for part in line.split("|")] for line in lines if line and line[0] != "#"]
    assert all(len(entry) == 3 and entry[2] for entry in fields), "each line says what is missing"
    return {name for name, world_sizes, _ in fields if str(world_size) in world_sizes.split()}


def test_representative_operations_pass(tmp_path):
    outcomes = _run(tmp_path, 2, REPRESENTATIVE)
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "passed"} == {}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_exactly_the_listed_tests_do_not_pass(tmp_path, world_size):
    outcomes = _run(tmp_path, world_size)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.startswith("failed")}
    listed = _listed(world_size)
    unexpected = {name: why for name, why in failed.items() if name not in listed}
    assert not unexpected, "\n".join([*map(str, unexpected.items()), outcomes.stderr[-6000:]])
    assert listed - failed.keys() == set(), "these pass now: take them off the list"
    assert list(outcomes.values()).count("passed") >= PASSING[world_size]


def test_gloo_cannot_be_constructed_where_the_suite_runs():
    program = (
        "import tests.conformance.driver, torch, torch.distributed as dist\n"
        "from tests.support.no_gloo import GlooWasAsked\n"
        "try:\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "except GlooWasAsked:\n"
        "    print('refused')\n"
    )
    environment = os.environ | {"BACKEND": "mlsys", "BACKEND_PLUGIN": "mlsys_engine.comm"}
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "refused"
