from __future__ import annotations

import json
import os

import pytest

import mlsys_engine as mls
from mlsys_engine.cli import plan
from mlsys_engine.cli.main import main
from mlsys_engine.verify import Difference, Verdict
from tests.support.ranks import run_ranks

_SMALL = ["--model.width", "16", "--model.num-layers", "2", "--model.num-heads", "2", "--batch-size", "8"]
_SMALL += ["--model.context-length", "16", "--corpus-bytes", "200000", "--eval-samples", "16"]


def test_the_plan_is_printed_and_no_verdict_where_none_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--ranks", "3", *_SMALL]) == 0
    assert "data_parallel, data 3 = 3 ranks" in capsys.readouterr().out
    assert main(["plan", "--ranks", "3", *_SMALL, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert mls.Plan.from_json(json.dumps(printed["plan"])).world_size == 3 and printed["verdict"] is None


def test_it_is_refused_for_no_rank_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ranks", "-1", *_SMALL]) == 2
    assert "A plan is for at least 1 rank" in capsys.readouterr().err


def test_a_plan_that_is_wrong_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    culprit = Difference(kind="gradient", name="norm.weight", relative=1.0, absolute=1.0, rank=0)
    verdict = Verdict(
        ok=False, culprit=culprit, tolerance=1e-10, tolerance_reason="", dtype="float64", plan_hash="abc",
        strategy="data_parallel", world_size=2, loss=1.0, plan_loss=1.0, compared={}, num_different=1,
        largest=1.0, worst=(culprit,),
    )  # fmt: skip
    monkeypatch.setattr(plan, "verify", lambda *arguments, **options: verdict)
    assert main(["plan", "--verify", *_SMALL]) == plan.EXIT_DIFFERENT == 1
    assert "DIFFERENT" in capsys.readouterr().out


def _in_a_process_that_may_fork(rank: int, world_size: int) -> list[int]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MLSYS_LAUNCHER"):
        os.environ.pop(name, None)
    strategies = ("data_parallel", "pipeline_parallel")
    return [main(["plan", "--verify", "--strategy", name, *_SMALL]) for name in strategies]


def test_a_recipes_plans_are_proved() -> None:
    assert run_ranks(_in_a_process_that_may_fork, 1, init=False) == [[0, 0]]
