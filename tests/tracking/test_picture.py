from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from mlsys_engine.tracking import loss_picture, report_page
from mlsys_engine.tracking.picture import loss_curves, smooth

_BASELINES = {"bigram": {"bits_per_byte": 3.5}, "majority": {"accuracy": 0.4}}


def _fields(**manifest: Any) -> dict[str, Any]:
    return {"id": "r1", "world_size": 2, "backend": "mlsys", "baselines": _BASELINES, "manifest": manifest}


def test_byte_models_are_drawn_in_bits_per_byte_beside_their_baselines() -> None:
    rows = [{"step": 1, "loss": math.log(2.0) * 4}, {"step": 2, "val_loss": math.log(2.0) * 3}]
    curves = loss_curves(_fields(data={"unit": "byte"}), rows)
    assert curves.unit == "bits per byte"
    assert curves.train == ((1, pytest.approx(4.0)),)
    assert curves.validation == ((2, pytest.approx(3.0)),)
    assert curves.levels == {"bigram": 3.5}


def test_the_unit_is_also_learnt_from_a_row_with_both() -> None:
    rows = [{"step": 1, "loss": 4.0}, {"step": 1, "val_loss": 2.0, "val_bits_per_byte": 1.0}]
    curves = loss_curves(_fields(), rows)
    assert (curves.train, curves.validation) == (((1, 2.0),), ((1, 1.0),))


def test_a_loss_of_unknown_unit_is_drawn_as_it_is_without_foreign_baselines() -> None:
    curves = loss_curves(_fields(), [{"step": 1, "loss": 4.0}])
    assert (curves.unit, curves.train, curves.levels) == ("loss", ((1, 4.0),), {})


def test_the_picture_names_the_run_its_curves_and_its_ranks() -> None:
    rows = [{"step": step, "loss": 3.0} for step in range(1, 60)]
    text = loss_picture(_fields(data={"unit": "byte"}), [*rows, {"step": 59, "val_loss": 2.0}])
    ElementTree.fromstring(text)
    for words in ("Loss of run r1", "training, smoothed", "validation", "bigram 3.5", "2 ranks on mlsys"):
        assert words in text


def test_smoothing_keeps_a_constant_and_leaves_out_what_is_not_finite() -> None:
    points = [(float(step), math.nan if step == 5 else 2.0) for step in range(200)]
    smoothed = smooth(points)
    assert len(smoothed) == 199
    assert all(y == pytest.approx(2.0, rel=1e-12) for _, y in smoothed)
    assert smooth([]) == []


def test_smoothing_does_not_lag_behind_a_straight_fall() -> None:
    # A centred window over a straight line gives the line itself, but where it is cut off at the end.
    points = [(float(step), 10.0 - 0.01 * step) for step in range(600)]
    assert [y for _, y in smooth(points)][:580] == pytest.approx([y for _, y in points][:580], rel=1e-9)


def test_the_report_is_one_page_with_the_picture_and_escaped_text() -> None:
    fields = _fields(code={"commit": "abc", "dirty": True}, note="<script>") | {"metrics": {"val_loss": 2.0}}
    page = report_page(fields, [{"step": 1, "loss": 1.0}])
    assert "<svg" in page and "abc with changes" in page and "bigram, bits per byte" in page
    assert "<script>" not in page and "src=" not in page and "http-equiv" not in page
