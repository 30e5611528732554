from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mlsys_engine.cli import doctor, selftest
from mlsys_engine.cli.main import main
from mlsys_engine.errors import NativeBuildError
from mlsys_engine.tracking import TRACKERS


def _not_built() -> Any:
    raise NativeBuildError("The native extensions are not built. Type: make")


def test_without_a_build_it_says_what_to_type_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "build_info", _not_built)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "NOT BUILT. The native extensions are not built. Type: make" in text
    assert "not run" in text and "Traceback" not in text


def test_an_extension_that_does_not_load_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setitem(doctor._LOADERS, "comm", broken)
    assert main(["doctor", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert findings["native"]["extensions"]["comm"] == "cannot be loaded: undefined symbol"
    assert findings["self_test"] is None


def test_the_findings_name_what_was_built_and_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no-self-test"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["torch"] == torch.__version__
    assert findings["native"]["build"]["torch"] and findings["native"]["simd"] in ("scalar", "avx2", "avx512")
    assert set(findings["native"]["extensions"].values()) == {"loaded"}
    assert findings["trackers"] == dict.fromkeys(TRACKERS, True)
    assert findings["threads"]["torch_threads"] >= 1 and findings["hardware"]["cpu"]
    assert set(findings["mpi"]) == {"mpi4py", "mpirun", "version"}


def test_the_self_test_passes_on_two_ranks(run_ranks: Any) -> None:
    first, second = run_ranks(_self_test, 2)
    for result in (first, second):
        assert result["passed"], result["cause"]
        assert (result["ranks"], result["backend"]) == (2, "mlsys")


def _self_test(rank: int, world_size: int) -> dict[str, Any]:
    import mlsys_engine

    return selftest.run_rank(mlsys_engine.init())


@pytest.mark.slow
def test_the_doctor_runs_the_self_test_and_ends_with_0(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capfd.readouterr().out
    assert "2 ranks on mlsys" in text and "exact" in text


def test_a_failed_self_test_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_examine_native", lambda: {"built": True, "error": "", "extensions": {}})
    monkeypatch.setattr(selftest, "run_on_two_ranks", lambda: {"passed": False, "cause": "wrong sums"})
    assert main(["doctor"]) == 1
    assert "FAILED: wrong sums" in capsys.readouterr().out


def test_cpus_are_told_as_spans() -> None:
    assert doctor._spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert doctor._spans([3]) == "3"
