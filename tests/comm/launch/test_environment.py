"""`detect` on the variables that each launcher really sets (taken from runs of the launchers)."""

from __future__ import annotations

import pytest

from mlsys_engine.comm.launch.environment import (
    Placement,
    detect,
    expand_hosts,
    expand_task_counts,
    launched,
    unused_slurm_tasks,
)
from mlsys_engine.errors import LaunchError

MASTER = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    **MASTER,
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}
SLURM_JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SLURM = {
    **SLURM_JOB,
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
LOCAL = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MLSYS_LAUNCHER": "local",
    **MASTER,
}


def test_no_variables_mean_a_world_of_one() -> None:
    assert detect({"PATH": "/bin", "OMP_NUM_THREADS": "4"}) == Placement(
        launcher="single", rank=0, world_size=1, local_rank=0, local_size=1
    )


def test_torchrun_variables_are_read() -> None:
    assert detect(TORCHRUN) == Placement(
        launcher="torchrun",
        rank=5,
        world_size=8,
        local_rank=1,
        local_size=4,
        address="node7",
        port=29500,
    )


def test_open_mpi_variables_are_read_and_the_meeting_place_is_left_to_mpi() -> None:
    assert detect(OPEN_MPI) == Placement(launcher="openmpi", rank=3, world_size=4, local_rank=1, local_size=2)


def test_mpich_variables_are_read_and_the_meeting_place_is_left_to_mpi() -> None:
    assert detect(MPICH) == Placement(launcher="mpich", rank=1, world_size=2, local_rank=1, local_size=2)


def test_mpirun_with_a_master_address_does_not_need_mpi() -> None:
    place = detect(MPICH | MASTER)
    assert (place.launcher, place.address, place.port) == ("mpich", "node7", 29500)


def test_slurm_variables_are_read_with_the_first_host_as_meeting_place() -> None:
    place = detect(SLURM)
    assert (place.launcher, place.rank, place.world_size) == ("slurm", 4, 5)
    assert (place.local_rank, place.local_size, place.address) == (0, 1, "gpu07")


def test_all_ranks_of_a_slurm_step_derive_one_port_and_the_next_step_another() -> None:
    assert detect(SLURM).port == detect(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).port
    assert detect(SLURM).port != detect(SLURM | {"SLURM_STEP_ID": "3"}).port


def test_srun_with_pmi_variables_of_the_same_rank_is_slurm() -> None:
    assert detect(SLURM | {"PMI_RANK": "4", "PMI_SIZE": "5"}).launcher == "slurm"


def test_an_old_slurm_that_names_the_step_by_the_job_alone_is_read() -> None:
    step_only = {key: value for key, value in SLURM.items() if not key.startswith("SLURM_STEP_")}
    old = step_only | {"SLURM_STEP_ID": "0", "SLURM_NODELIST": "r[1-2]n[01-02]", "SLURM_NODEID": "3"}
    place = detect(old | {"SLURM_NTASKS": "8", "SLURM_PROCID": "7", "SLURM_NTASKS_PER_NODE": "2"})
    assert (place.rank, place.world_size, place.local_size, place.address) == (7, 8, 2, "r1n01")
    place = detect(old | {"SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "2(x3),1"})
    assert place.local_size == 1


def test_tasks_of_the_job_say_nothing_about_a_smaller_step() -> None:
    step = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_TASKS_PER_NODE"}
    assert detect(step | {"SLURM_NTASKS_PER_NODE": "4"}).local_size is None
    assert detect(step | {"SLURM_TASKS_PER_NODE": "4(x3)"}).local_size is None


def test_intel_mpi_inside_a_slurm_allocation_goes_by_its_own_ranks() -> None:
    # Its proxies are a step of one task a node, whose variables the ranks inherit.
    proxy = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    intel = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    assert detect(proxy | intel | {"I_MPI_MPIRUN": "mpirun"}) == Placement(
        launcher="mpich", rank=5, world_size=8, local_rank=1, local_size=4
    )


def test_own_launcher_variables_are_read() -> None:
    assert detect(LOCAL).launcher == "local"


def test_variables_by_hand_need_no_local_rank() -> None:
    place = detect({"RANK": "1", "WORLD_SIZE": "2", **MASTER})
    assert (place.launcher, place.local_rank, place.local_size) == ("env", None, None)


def test_one_rank_by_hand_needs_no_meeting_place() -> None:
    assert detect({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


@pytest.mark.parametrize("outer", [SLURM, OPEN_MPI, MPICH])
def test_torchrun_started_by_another_launcher_wins(outer: dict[str, str]) -> None:
    assert detect(outer | TORCHRUN).launcher == "torchrun"


def test_mpirun_inside_a_slurm_step_wins() -> None:
    assert detect(SLURM | OPEN_MPI).launcher == "openmpi"


def test_variables_by_hand_inside_a_one_task_slurm_shell_are_used() -> None:
    shell = {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert detect(shell | {"RANK": "1", "WORLD_SIZE": "2", **MASTER}).launcher == "env"


def test_variables_by_hand_that_agree_with_mpirun_meet_through_mpi_without_an_address() -> None:
    assert detect(MPICH | {"RANK": "1", "WORLD_SIZE": "2"}).launcher == "mpich"


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not"),
        ({"PMI_RANK": "0"}, "PMI_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MASTER}, "RANK='-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0", **MASTER}, "WORLD_SIZE='0'"),
        ({"RANK": "0", "WORLD_SIZE": "two", **MASTER}, "WORLD_SIZE='two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT not set"),
        (MPICH | {"MASTER_PORT": "1"}, "MASTER_ADDR not set"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 with LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE=16 with WORLD_SIZE=8"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_incomplete_or_impossible_variables_are_refused(env: dict[str, str], told: str) -> None:
    with pytest.raises(LaunchError) as refusal:
        detect(env)
    assert told in refusal.value.given
    assert refusal.value.expected
    assert refusal.value.action


@pytest.mark.parametrize(
    "env",
    [
        OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "2", **MASTER},
        MPICH | {"RANK": "0", "WORLD_SIZE": "2", **MASTER},
        SLURM | {"RANK": "4", "WORLD_SIZE": "8", **MASTER},
        OPEN_MPI | MPICH,
    ],
)
def test_two_launchers_that_disagree_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="Two launchers disagree"):
        detect(env)


def test_a_batch_script_is_no_rank_but_is_told_of_its_idle_tasks() -> None:
    assert detect(SLURM_JOB).launcher == "single"
    assert unused_slurm_tasks(SLURM_JOB) == 5
    assert unused_slurm_tasks(SLURM) == 0
    assert unused_slurm_tasks({}) == 0


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        (SLURM_JOB, False),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        (TORCHRUN, True),
        (OPEN_MPI, True),
        (SLURM, True),
        ({"RANK": "1"}, True),
    ],
)
def test_launched_tells_ranks_from_programs_that_may_start_ranks(env: dict[str, str], expected: bool) -> None:
    assert launched(env) is expected


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("solo", ["solo"]),
        ("a,b", ["a", "b"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("rack[1-2]-node", ["rack1-node", "rack2-node"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_slurm_host_lists_are_expanded(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_slurm_task_counts_are_expanded() -> None:
    assert expand_task_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_task_counts("") == []
