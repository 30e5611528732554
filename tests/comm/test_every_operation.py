"""Every operation with every dtype and reduction: the right result, or a refusal in words; gloo's bits.

The reference is computed in float64 with the tolerance of inputs.py. Two ranks are also compared with gloo
bit for bit wherever gloo takes the call, and whatever gloo takes must not be refused.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.inputs import FLOATS, INTEGERS, assert_reduced, tensor_of
from tests.comm.operations import MOVING, REDUCING
from tests.support.no_gloo import forbid_gloo
from tests.support.ranks import run_ranks

COMPLEX = (torch.complex64, torch.complex128, torch.complex32)
NOT_REDUCED = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, *COMPLEX, *NOT_REDUCED)
OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")
FACTOR = 0.5  # a power of two: scaling rounds nothing, so the reference is the sum of scaled inputs
NUMEL = 37  # a rank's part


def _takes(dtype: torch.dtype, op: str) -> bool:
    if dtype in NOT_REDUCED:
        return False
    if dtype.is_complex:
        return op in ("SUM", "AVG", "PREMUL_SUM")
    return op not in (("BAND", "BOR", "BXOR") if dtype.is_floating_point else ("AVG", "PREMUL_SUM"))


def _input(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_complex:
        parts = {torch.complex32: torch.float16, torch.complex64: torch.float32}.get(dtype, torch.float64)
        return torch.view_as_complex(tensor_of(rank, 2 * numel, parts).view(numel, 2))
    if dtype in NOT_REDUCED:
        return tensor_of(rank, numel, torch.uint8).to(dtype)
    return tensor_of(rank, numel, dtype)


def _bytes(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _run_table(rank: int, world_size: int, backend: str, folder: str, members: list[int]) -> dict[Any, Any]:
    """Every entry's outcome on this rank: what came, as bytes, or the words of the refusal."""
    if backend != "gloo":
        forbid_gloo()
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    whole = members == list(range(world_size))
    group = dist.group.WORLD if whole else dist.new_group(members)
    if rank not in members:
        return {}
    mine, size = members.index(rank), len(members)
    outcomes: dict[Any, Any] = {}

    def note(key: Any, call: Any) -> None:
        try:
            outcomes[key] = call()
        except (ValueError, RuntimeError) as error:  # what gloo raises is a RuntimeError
            outcomes[key] = f"{type(error).__name__}: {error}"

    def reduce(name: str, op: str, dtype: torch.dtype) -> tuple[bytes | None, int | None]:
        known = dist._make_nccl_premul_sum(FACTOR) if op == "PREMUL_SUM" else getattr(dist.ReduceOp, op)
        result, part = REDUCING[name](_input(mine, NUMEL * size, dtype), known, group)
        return _bytes(result), part

    def move(name: str, dtype: torch.dtype) -> dict[int, bytes | None]:
        received = MOVING[name](_input(mine, NUMEL, dtype), group)
        return {peer: _bytes(tensor) for peer, tensor in received.items()}

    for dtype in DTYPES:
        for name in REDUCING:
            for op in OPS:
                note((name, dtype, op), functools.partial(reduce, name, op, dtype))
        for name in MOVING:
            note((name, dtype), functools.partial(move, name, dtype))
    dist.barrier(group=group)
    return outcomes


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor


def _check_reduction(key: Any, outcome: Any, size: int) -> None:
    _, dtype, op = key
    if not _takes(dtype, op):
        assert isinstance(outcome, str), f"{key} was not refused"
        # torch.distributed itself answers for complex numbers in all_reduce.
        assert op in outcome, outcome
        assert outcome.startswith(("ConfigError", "UserError", "ValueError")), outcome
        return
    assert not isinstance(outcome, str), f"{key}: {outcome}"
    data, part = outcome
    if data is None:
        return
    inputs = [_input(peer, NUMEL * size, dtype) for peer in range(size)]
    if part is not None:
        inputs = [tensor[NUMEL * part : NUMEL * (part + 1)] for tensor in inputs]
    got = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    inputs = [_numbers(tensor) for tensor in inputs]
    if op == "PREMUL_SUM":
        inputs, op = [tensor * FACTOR for tensor in inputs], "SUM"
    assert_reduced(_numbers(got), inputs, getattr(dist.ReduceOp, op))


def _check(outcomes: list[dict[Any, Any]], size: int) -> None:
    for rank, of_rank in enumerate(outcomes):
        assert len(of_rank) == len(DTYPES) * (len(REDUCING) * len(OPS) + len(MOVING))
        for key, outcome in of_rank.items():
            if len(key) == 3:
                _check_reduction(key, outcome, size)
                continue
            assert not isinstance(outcome, str), f"rank {rank}, {key}: {outcome}"
            for peer, data in outcome.items():
                assert data == _bytes(_input(peer, NUMEL, key[1])), (rank, key, peer)


def test_every_operation_dtype_and_reduction_on_two_ranks_is_right_and_has_the_bits_of_gloo(tmp_path):
    (tmp_path / "ours").mkdir()
    got = run_ranks(_run_table, 2, "mlsys", str(tmp_path / "ours"), [0, 1], init=False)
    _check(got, 2)
    expected = run_ranks(_run_table, 2, "gloo", str(tmp_path), [0, 1], init=False)
    taken = 0
    for rank in range(2):
        for key, outcome in expected[rank].items():
            # gloo takes tensors with gaps and returns wrong sums of them.
            if not isinstance(outcome, str) and key[0] != "all_reduce of every third element":
                taken += 1
                wanted, given = outcome, got[rank][key]
                if key[1] == torch.bool and len(key) == 3 and wanted[0] is not None:
                    # gloo adds bools as bytes and leaves a 2 in them, which torch reads as True.
                    wanted = bytes(map(bool, wanted[0])), wanted[1]
                assert given == wanted, (rank, key)
    assert taken > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "members", "locality"),
    [(3, [0, 1, 2], ""), (4, [0, 2, 3], ""), (4, [0, 1, 2, 3], "0,0,1,1"), (4, [3, 1], "0,0,1,1")],
)
def test_every_operation_dtype_and_reduction_on_more_ranks_subgroups_and_hosts(
    tmp_path, world_size, members, locality
):
    outcomes = run_ranks(
        _run_table,
        world_size,
        "mlsys",
        str(tmp_path),
        sorted(members),
        init=False,
        env={"MLSYS_LOCALITY": locality},
    )
    _check([outcomes[rank] for rank in sorted(members)], len(members))
