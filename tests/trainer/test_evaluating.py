"""Evaluation is the mean over every sample, on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mlsys_engine.errors import DataError
from tests.trainer import workloads
from tests.trainer.workloads import make_loader, make_trainer


def _expected(num_samples: int) -> float:
    model = workloads.make_model().eval()
    batch = next(iter(make_loader(num_samples, batch_size=num_samples, shuffle=False)))
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(model(batch[0]).double(), batch[1].double()))


def _evaluate(
    rank: int, world_size: int, run_dir: str, num_samples: int, batch_size: int
) -> dict[str, float]:
    return make_trainer(run_dir).evaluate(make_loader(num_samples, batch_size, shuffle=False))


@pytest.mark.parametrize(("num_samples", "batch_size"), [(60, 8), (61, 7), (5, 4), (1, 4), (4, 2)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_sample_is_dropped_or_doubled_by_uneven_shards(
    tmp_path: Path, run_ranks: Any, world_size: int, num_samples: int, batch_size: int
) -> None:
    results = run_ranks(_evaluate, world_size, str(tmp_path), num_samples, max(batch_size, world_size))
    assert all(result == results[0] for result in results)
    # fp32 losses of single samples, added in double precision.
    assert results[0]["val_loss"] == pytest.approx(_expected(num_samples), rel=1e-6)


def test_one_rank_gets_the_same(tmp_path: Path) -> None:
    assert _evaluate(0, 1, str(tmp_path), 61, 7)["val_loss"] == pytest.approx(_expected(61), rel=1e-6)


def test_bits_per_byte_are_reported_when_the_record_says_that_a_token_is_a_byte(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    metrics = trainer.fit(
        make_loader(), max_steps=1, eval_loader=make_loader(), record={"data": {"unit": "byte"}}
    ).metrics
    assert metrics["val_bits_per_byte"] == metrics["val_loss"] / math.log(2.0)
    assert trainer.evaluate(make_loader())["val_bits_per_byte"] == metrics["val_bits_per_byte"]


def test_bits_per_byte_are_not_reported_otherwise(tmp_path: Path) -> None:
    metrics = make_trainer(tmp_path).fit(make_loader(), max_steps=1, eval_loader=make_loader()).metrics
    assert "val_bits_per_byte" not in metrics


def test_an_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_loader(), max_steps=1)
    with pytest.raises(DataError):
        trainer.evaluate(DataLoader(workloads.make_dataset(3), batch_size=8, drop_last=True))
