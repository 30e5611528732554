from __future__ import annotations

import pytest
import torch

from mlsys_engine.verify.widen import cast_batch, widened


def test_inside_every_narrower_type_is_float64() -> None:
    value = torch.ones(3, dtype=torch.float64)
    with widened():
        found = [
            value.float(),
            value.half(),
            value.to(torch.bfloat16),
            value.softmax(-1, dtype=torch.float32),
            torch.zeros(2),
            torch.zeros(2, dtype=torch.float32),
        ]
    assert {tensor.dtype for tensor in found} == {torch.float64}
    assert value.float().dtype is torch.float32 and torch.zeros(1).dtype is torch.float32


def test_the_default_type_comes_back_when_something_raises() -> None:
    with pytest.raises(ZeroDivisionError), widened():
        raise ZeroDivisionError
    assert torch.get_default_dtype() is torch.float32


def test_only_floating_tensors_of_a_batch_are_cast_at_any_depth() -> None:
    batch = {"ids": torch.arange(2), "deep": {"values": [torch.ones(2), "name"]}}
    cast = cast_batch(batch, torch.float64)
    assert cast["ids"].dtype is torch.int64 and cast["deep"]["values"][0].dtype is torch.float64
    assert cast["deep"]["values"][1] == "name"
    assert cast_batch(batch, None)["deep"]["values"][0].dtype is torch.float32
