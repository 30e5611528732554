from __future__ import annotations

import pytest
import torch

from mlsys_engine.errors import DataError
from mlsys_engine.pipeline.runtime.cut import cut, signature


@pytest.mark.parametrize(("rows", "pieces"), [(8, 4), (7, 4), (2, 4), (1, 4), (5, 1)])
def test_pieces_are_those_of_tensor_split_without_empty_ones(rows, pieces):
    whole = torch.arange(rows * 3).view(rows, 3)
    expected = [piece for piece in torch.tensor_split(whole, pieces) if len(piece)]
    for batch in (whole, {"x": whole}, (whole, [whole])):
        found = cut(batch, pieces)
        leaf = {dict: lambda b: b["x"], tuple: lambda b: b[1][0]}.get(type(batch), lambda b: b)
        assert [leaf(piece).tolist() for piece in found] == [piece.tolist() for piece in expected]


def test_what_has_no_row_for_each_sample_goes_to_every_piece():
    shared, scale = torch.arange(4)[None], torch.tensor(2.0)
    for piece in cut({"x": torch.zeros(4, 2), "positions": shared, "scale": scale, "name": "a"}, 2):
        assert piece["positions"] is shared and piece["scale"] is scale and piece["name"] == "a"


def test_a_tensor_with_another_number_of_rows_is_refused():
    with pytest.raises(DataError, match="Give the microbatches themselves"):
        cut({"x": torch.zeros(4, 2), "y": torch.zeros(3, 2)}, 2)


def test_a_signature_tells_shapes_types_and_other_values_apart_but_not_what_tensors_hold():
    batch = {"x": torch.zeros(4, 2), "flag": True}
    assert signature(batch) == signature({"x": torch.ones(4, 2), "flag": True})
    for other in ({"x": torch.zeros(4, 3), "flag": True}, {"x": torch.zeros(4, 2), "flag": False}):
        assert signature(batch) != signature(other)
    assert signature(batch) != signature({"x": torch.zeros(4, 2).double(), "flag": True})
