"""The operators under torch.ops.mlsys: their schemas, their checks, and their fakes."""

from __future__ import annotations

import pytest
import torch

from mlsys_engine.optim.kernels import CHUNK_ELEMENTS, HYPER_COLUMNS, SEGMENT_COLUMNS, operators
from mlsys_engine.optim.segments import CHUNK_COLUMN, fill_lengths, total_chunks


def empty_step(**replaced: torch.Tensor) -> None:
    arguments = {
        "table": torch.zeros(0, SEGMENT_COLUMNS, dtype=torch.int64),
        "hyper": torch.zeros(1, HYPER_COLUMNS, dtype=torch.float64),
        "steps": torch.ones(1),
    } | replaced
    operators().adamw_step(*arguments.values(), 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_passes_torchs_operator_checks(dtype: torch.dtype) -> None:
    torch.library.opcheck(operators().cast.default, (torch.randn(3, 5), dtype))


def test_sum_of_squares_operator_passes_torchs_operator_checks() -> None:
    data = torch.randn(10)
    spans = torch.tensor([[data.data_ptr(), 10]])
    torch.library.opcheck(
        operators().sum_of_squares.default,
        (spans, torch.empty((), dtype=torch.float64)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_halves_of_the_sum_of_squares_pass_torchs_operator_checks() -> None:
    data = torch.randn(CHUNK_ELEMENTS + 10)
    spans = torch.tensor([[data.data_ptr(), data.numel()]])
    for operator, arguments in (
        (operators().chunk_squares, (spans, torch.empty(2, dtype=torch.float64))),
        (operators().add_terms, (torch.ones(3, dtype=torch.float64), torch.empty((), dtype=torch.float64))),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_chunk_squares_refuses_another_number_of_terms_than_chunks() -> None:
    data = torch.zeros(CHUNK_ELEMENTS + 1)
    spans = torch.tensor([[data.data_ptr(), data.numel()]])
    with pytest.raises(RuntimeError, match=r"chunk_squares: out is Double \[1\].* 2 elements are expected"):
        operators().chunk_squares(spans, torch.empty(1, dtype=torch.float64))


def test_a_launch_with_another_number_of_chunks_than_its_table_is_refused() -> None:
    table, control = torch.zeros(0, SEGMENT_COLUMNS, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
    hyper = torch.zeros(1, HYPER_COLUMNS, dtype=torch.float64)
    operators().adamw_step.device(table, hyper, torch.ones(1), control, 0)
    with pytest.raises(RuntimeError, match="has 0 chunks and total_chunks is 1"):
        operators().adamw_step.device(table, hyper, torch.ones(1), control, 1)


def test_an_empty_table_is_a_step_of_nothing() -> None:
    empty_step()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"table": torch.zeros(0, 3, dtype=torch.int64)}, r"table is Long \[0, 3\]"),
        ({"table": torch.zeros(1, SEGMENT_COLUMNS)}, "contiguous Long CPU tensor is expected"),
        ({"hyper": torch.zeros(HYPER_COLUMNS, 1, dtype=torch.float64).t()[:, ::2]}, "not contiguous"),
        ({"table": torch.full((1, SEGMENT_COLUMNS), 5, dtype=torch.int64)}, "names hyper row 5"),
    ],
)
def test_step_operator_refuses_tables_that_do_not_fit(
    replaced: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        empty_step(**replaced)


def test_cast_refuses_types_that_are_not_half_precision() -> None:
    with pytest.raises(RuntimeError, match="cast: Double was given"):
        operators().cast(torch.zeros(2, dtype=torch.float64), torch.bfloat16)


def test_chunks_count_up_through_the_table_over_empty_segments() -> None:
    table = torch.zeros(4, SEGMENT_COLUMNS, dtype=torch.int64)
    fill_lengths(table, [0, CHUNK_ELEMENTS + 1, 0, 1], [0] * 4, [0] * 4)
    assert table[:, CHUNK_COLUMN].tolist() == [0, 0, 2, 2]
    assert total_chunks(table) == 3
    assert total_chunks(table[:0]) == 0
