from __future__ import annotations

import json
import math

from mlsys_engine.verify import Difference, Verdict

_CULPRIT = Difference(
    kind="gradient",
    name="blocks.1.norm.weight",
    relative=0.5,
    absolute=math.inf,
    rank=3,
    where="bucket 2, stage 1",
    cause="it is 1/2 of what it should be",
)


def _verdict(*differences: Difference) -> Verdict:
    return Verdict(
        ok=not differences,
        culprit=differences[0] if differences else None,
        tolerance=1e-10,
        tolerance_reason="because",
        dtype="float64",
        plan_hash="abc",
        strategy="data_parallel",
        world_size=4,
        loss=1.0,
        plan_loss=2.0,
        compared={"output": 5, "gradient": 4, "buffer": 0},
        num_different=len(differences),
        largest=0.5,
        worst=differences,
        notes=("dropout was kept",),
    )


def test_a_verdict_is_true_where_the_plan_is_right() -> None:
    assert _verdict() and not _verdict(_CULPRIT)


def test_the_line_names_the_culprit_its_place_the_tolerance_and_the_cause() -> None:
    assert _verdict(_CULPRIT).line == (
        "DIFFERENT: plan abc (data_parallel, 4 ranks) parts from the unsharded model at the gradient of "
        "blocks.1.norm.weight (bucket 2, stage 1): 0.5 relative on rank 3, tolerance 1.0e-10 in float64; it "
        "is 1/2 of what it should be."
    )
    assert _verdict().line.startswith(
        "EQUAL: plan abc (data_parallel, 4 ranks) takes the step of the unsharded"
    )


def test_it_prints_a_table_of_the_largest_differences_in_aligned_columns() -> None:
    text = str(_verdict(_CULPRIT))
    head = next(line for line in text.splitlines() if "absolute" in line)
    row = next(line for line in text.splitlines() if line.lstrip().startswith("gradient "))
    for title, value in (("name", "blocks.1"), ("relative", "5.00e-01"), ("where", "bucket 2")):
        assert head.index(title) == row.index(value)
    assert "compared   5 outputs, 4 gradients; 1 differ" in text and "buffer" not in text
    assert text.endswith("note: dropout was kept")
    assert "absolute" not in str(_verdict())


def test_the_model_itself_and_totals_are_named_in_words() -> None:
    whole = Difference(kind="output", name="", relative=1.0, absolute=1.0, rank=0)
    assert whole.title == "the output of the model"
    loss = Difference(kind="total", name="loss", relative=1.0, absolute=1.0, rank=0)
    assert loss.title == "the loss"


def test_its_json_is_json_and_writes_infinity_as_text() -> None:
    read = json.loads(_verdict(_CULPRIT).to_json())
    assert read["culprit"]["absolute"] == "inf" and read["worst"][0]["name"] == "blocks.1.norm.weight"
