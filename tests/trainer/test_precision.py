"""Trainings in half precision: exact resume with the loss scale, and what the record says of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsys_engine import optim, strategies, tracking
from mlsys_engine.data_parallel.build import FIRST_LOSS_SCALE
from tests.trainer import workloads
from tests.trainer.workloads import Losses, make_loader, make_trainer

TOTAL_STEPS = 14


class Scales:
    """Collects the loss scale of every step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_step_end(self, step: int, result: Any) -> None:
        self.by_step[step] = result.measured["loss_scale"].item()


def _train(
    rank: int, world_size: int, run_dir: str, kind: tuple[str, str], leg: tuple[int, int]
) -> tuple[dict[int, float], dict[int, float], list[float]]:
    """Losses and loss scales by step, and the final weights. The scale soon grows too large, and again.

    A kind is a precision and what is sharded; a leg is the seed of the initial weights and the step to go on
    to.
    """
    precision, shard = kind
    model_seed, max_steps = leg
    losses, scales = Losses(), Scales()
    model = workloads.make_model(seed=model_seed)
    trainer = make_trainer(
        run_dir,
        losses,
        scales,
        model=model,
        precision=precision,
        strategy=strategies.DataParallel(shard=shard, bucket_mib=1e-4),
        loss_scaler=optim.LossScaler(init_scale=2.0**13, growth_factor=4.0, growth_interval=2),
        lr_schedule=optim.schedules.Cosine(total_steps=TOTAL_STEPS, warmup_steps=3),
        max_grad_norm=0.5,
        accumulate=2,
    )
    trainer.fit(make_loader(), max_steps=max_steps, save_every=100, eval_loader=make_loader(), eval_every=5)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
    return losses.by_step, scales.by_step, weights


@pytest.mark.parametrize(
    ("world_size", "kind"),
    [
        pytest.param(1, ("fp16", "none"), marks=pytest.mark.slow),
        pytest.param(2, ("fp16", "none"), marks=pytest.mark.slow),
        (2, ("fp16", "optimizer")),
        pytest.param(1, ("fp16-pure", "none"), marks=pytest.mark.slow),
        pytest.param(2, ("fp16-pure", "none"), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_fp16_training_equals_the_one_never_stopped(
    tmp_path: Path, run_ranks: Any, world_size: int, kind: tuple[str, str]
) -> None:
    whole = run_ranks(_train, world_size, str(tmp_path / "whole"), kind, (0, TOTAL_STEPS))
    losses: dict[int, float] = {}
    scales: dict[int, float] = {}
    # Another initialisation each time: what matters must come from the checkpoint.
    for leg in ((0, 7), (1, TOTAL_STEPS)):
        parts = run_ranks(_train, world_size, str(tmp_path / "parts"), kind, leg)
        assert parts == [parts[0]] * world_size
        losses |= parts[0][0]
        scales |= parts[0][1]
    assert (losses, scales, parts[0][2]) == whole[0]
    changes = list(itertools.pairwise(scales.values()))
    assert any(after > before for before, after in changes)
    assert any(after < before for before, after in changes)


def test_the_loss_scale_and_the_noise_scale_are_logged(tmp_path: Path) -> None:
    meter = optim.GradientNoiseScale(every=2)
    trainer = make_trainer(
        tmp_path, precision="fp16", noise_scale=meter, accumulate=4, trackers=("local",), max_grad_norm=1.0
    )
    trainer.fit(make_loader(), max_steps=5)
    run = tracking.read_run(tmp_path)
    rows = [row for row in run.read_metrics().rows if "loss" in row]
    assert [row["loss_scale"] for row in rows] == [FIRST_LOSS_SCALE] * 5
    assert [row["step"] for row in rows if "noise_scale" in row] == [1, 3, 5]
    assert rows[-1]["noise_scale"] == meter.noise_scale
    assert "GradientNoiseScale(decay=0.99, every=2)" in (tmp_path / "run.json").read_text()


def test_a_resumed_training_goes_on_averaging_the_noise_scale(tmp_path: Path) -> None:
    whole, before, after = (optim.GradientNoiseScale() for _ in range(3))
    settings = {"accumulate": 2}
    make_trainer(tmp_path / "whole", noise_scale=whole, **settings).fit(make_loader(), max_steps=6)
    make_trainer(tmp_path / "parts", noise_scale=before, **settings).fit(
        make_loader(), max_steps=4, save_every=4
    )
    make_trainer(tmp_path / "parts", noise_scale=after, **settings).fit(make_loader(), max_steps=6)
    assert after.state_dict() == whole.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-pure", "fp16-pure"])
def test_half_precision_reaches_the_losses_of_single_precision(tmp_path: Path, precision: str) -> None:
    results = {}
    for name in ("fp32", precision):
        trainer = make_trainer(
            tmp_path / name, model=workloads.make_model(dropout=0.0), precision=name, max_grad_norm=1.0
        )
        loader = make_loader()
        results[name] = trainer.fit(loader, max_steps=40, eval_loader=loader).metrics["val_loss"]
    # bf16 keeps 8 bits: each product is off by up to 0.4%, independently of the others.
    assert results[precision] == pytest.approx(results["fp32"], rel=0.01)


def _train_invariant(rank: int, world_size: int, run_dir: str, max_steps: int) -> tuple[Any, Any]:
    losses, scales = Losses(), Scales()
    trainer = make_trainer(
        run_dir,
        losses,
        scales,
        precision="fp16",
        numerics="world_invariant",
        loss_scaler=optim.LossScaler(init_scale=2.0**13, growth_factor=4.0, growth_interval=2),
        max_grad_norm=0.5,
        seed=3,
    )
    trainer.fit(make_loader(), max_steps=max_steps, save_every=100)
    return losses.by_step, scales.by_step


def test_another_number_of_ranks_goes_on_with_the_loss_scale_bit_for_bit(
    tmp_path: Path, run_ranks: Any
) -> None:
    whole = run_ranks(_train_invariant, 1, str(tmp_path / "whole"), 12)[0]
    losses: dict[int, float] = {}
    scales: dict[int, float] = {}
    for world_size, max_steps in ((2, 5), (4, 9), (1, 12)):
        outcomes = run_ranks(_train_invariant, world_size, str(tmp_path / "parts"), max_steps)
        assert outcomes == [outcomes[0]] * world_size
        losses |= outcomes[0][0]
        scales |= outcomes[0][1]
    assert (losses, scales) == whole
    assert len(set(scales.values())) > 2


def test_a_training_goes_on_in_another_precision_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    losses, reference = Losses(), Losses()
    settings: dict[str, Any] = {"model": workloads.make_model(dropout=0.0)}
    make_trainer(tmp_path / "fp32", reference, **settings).fit(make_loader(), max_steps=15)
    for number, precision in enumerate(("bf16-pure", "fp32", "fp16-pure", "bf16", "fp16")):
        # Another initialisation each time: what matters must come from the checkpoint.
        model = workloads.make_model(seed=number, dropout=0.0)
        trainer = make_trainer(tmp_path / "all", losses, model=model, precision=precision)
        trainer.fit(make_loader(), max_steps=3 * number + 3, save_every=3)
    assert list(losses.by_step) == list(reference.by_step)
    said = capfd.readouterr().err
    for saved, present in (("bfloat16", "float32"), ("float32", "float16"), ("float16", "float32")):
        assert f"It was saved with {saved} weights and goes on with {present}." in said
    # bf16 rounds products to 8 bits; a training from other weights or moments would be off by tens of
    # percent.
    assert losses.values == pytest.approx(reference.values, rel=0.03)
