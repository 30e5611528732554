"""A training that was stopped and resumed is, step for step and bit for bit, one that was never stopped."""

from __future__ import annotations

import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from mlsys_engine import checkpoint, tracking
from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.trainer import TrainingInterrupted
from tests.trainer import workloads
from tests.trainer.workloads import Losses, make_loader, make_trainer

TOTAL_STEPS = 18  # of 8 steps an epoch, the last of them ragged


class SignalAt:
    """Sends this process SIGTERM at the end of a step, on one rank only."""

    def __init__(self, step: int, on_this_rank: bool) -> None:
        self.step, self.on_this_rank = step, on_this_rank

    def on_step_end(self, step: int) -> None:
        if step == self.step and self.on_this_rank:
            signal.raise_signal(signal.SIGTERM)


def _train(
    rank: int, world_size: int, run_dir: str, model_seed: int, stop: tuple[int, int]
) -> tuple[dict[int, float], int, list[float]]:
    """Losses by step, exit status (0 without a signal) and the final weights."""
    losses = Losses()
    model = workloads.make_model(seed=model_seed)
    trainer = make_trainer(
        run_dir,
        losses,
        SignalAt(stop[0], rank == stop[1]),
        model=model,
        max_grad_norm=0.5,
        lr_schedule=partial(lr_scheduler.CosineAnnealingLR, T_max=TOTAL_STEPS),
        accumulate=2,
        trackers=("local",),
    )
    status = 0
    try:
        trainer.fit(make_loader(), max_steps=TOTAL_STEPS, eval_loader=make_loader(), eval_every=5)
    except TrainingInterrupted as interrupted:
        status = int(interrupted.code or 0)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
    return losses.by_step, status, weights


def _check_exactness(run_ranks: Any, directory: Path, world_size: int, stops: list[tuple[int, int]]) -> None:
    """Trains without and with stops, each a (step, rank that gets the signal), and compares every step."""
    whole = run_ranks(_train, world_size, str(directory / "whole"), 0, (-1, 0))
    parts: dict[int, float] = {}
    for number, (stop_at, stop_rank) in enumerate([*stops, (-1, 0)]):
        # Another initialisation each time: what matters must come from the checkpoint.
        outcomes = run_ranks(_train, world_size, str(directory / "parts"), number, (stop_at, stop_rank))
        losses, status, weights = outcomes[0]
        assert [outcome[0] for outcome in outcomes] == [losses] * world_size
        assert [outcome[1] for outcome in outcomes] == [status] * world_size
        assert status == (128 + signal.SIGTERM if stop_at >= 0 else 0)
        assert not parts.keys() & losses.keys()
        parts |= losses
    assert parts == whole[0][0]
    assert weights == whole[0][2]
    rows = [tracking.read_run(directory / name).read_metrics().rows for name in ("whole", "parts")]
    logged = [[(row["step"], row["loss"]) for row in part if "loss" in row] for part in rows]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_training_equals_the_one_never_stopped(
    tmp_path: Path, run_ranks: Any, world_size: int
) -> None:
    _check_exactness(run_ranks, tmp_path, world_size, [(3, 0), (10, world_size - 1)])


def test_a_stop_at_the_end_of_an_epoch_resumes_exactly(tmp_path: Path, run_ranks: Any) -> None:
    _check_exactness(run_ranks, tmp_path, 2, [(7, 0)])  # takes effect after step 8, the last of the epoch


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(20))
def test_a_stop_at_a_random_step_resumes_exactly(tmp_path: Path, run_ranks: Any, trial: int) -> None:
    choose = random.Random(trial)
    world_size = 2 + trial % 2
    first = choose.randrange(1, TOTAL_STEPS - 4)
    stops = [(first, choose.randrange(world_size))]
    if choose.random() < 0.5:
        stops.append((choose.randrange(first + 2, TOTAL_STEPS - 1), choose.randrange(world_size)))
    _check_exactness(run_ranks, tmp_path, world_size, stops)


def _train_to(
    rank: int, world_size: int, run_dir: str, max_steps: int
) -> tuple[dict[int, float], list[float]]:
    losses = Losses()
    model = workloads.make_model(dropout=0.0)
    make_trainer(run_dir, losses, model=model).fit(make_loader(), max_steps=max_steps, save_every=100)
    return losses.by_step, [parameter.detach().sum().item() for parameter in model.parameters()]


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_samples(
    tmp_path: Path, run_ranks: Any, first: int, second: int
) -> None:
    whole, _ = run_ranks(_train_to, first, str(tmp_path / "whole"), 14)[0]
    before, _ = run_ranks(_train_to, first, str(tmp_path / "parts"), 6)[0]
    after, _ = run_ranks(_train_to, second, str(tmp_path / "parts"), 14)[0]
    assert list(before) + list(after) == list(whole)
    # The same samples and no dropout: only the order of fp32 sums differs.
    torch.testing.assert_close(list((before | after).values()), list(whole.values()), rtol=1e-4, atol=0.0)


def _train_invariant(rank: int, world_size: int, run_dir: str, max_steps: int) -> dict[int, float]:
    losses = Losses()
    trainer = make_trainer(run_dir, losses, numerics="world_invariant", max_grad_norm=0.5, seed=3)
    trainer.fit(make_loader(), max_steps=max_steps, save_every=100)
    return losses.by_step


def test_under_world_invariant_numerics_another_number_of_ranks_goes_on_bit_for_bit(
    tmp_path: Path, run_ranks: Any
) -> None:
    whole = run_ranks(_train_invariant, 1, str(tmp_path / "whole"), 18)[0]
    parts: dict[int, float] = {}
    for world_size, max_steps in ((2, 5), (4, 11), (1, 18)):  # step 8 and 16 end an epoch with half a batch
        outcomes = run_ranks(_train_invariant, world_size, str(tmp_path / "parts"), max_steps)
        assert outcomes == [outcomes[0]] * world_size
        parts |= outcomes[0]
    assert parts == whole


def test_another_number_of_ranks_is_said_plainly(
    tmp_path: Path, run_ranks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_train_to, 2, str(tmp_path), 3)
    _train_to(0, 1, str(tmp_path), 4)
    assert "saved by 2 ranks and goes on with 1" in capfd.readouterr().err


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    loader = make_loader()
    first = make_trainer(tmp_path).fit(loader, max_steps=3, save_every=3, eval_loader=loader)
    losses = Losses()
    again = make_trainer(tmp_path, losses).fit(loader, max_steps=3, save_every=3, eval_loader=loader)
    assert again.steps == 3
    assert losses.values == []
    assert again.metrics["val_loss"] == first.metrics["val_loss"]


def test_epochs_count_from_the_beginning_of_the_training(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(make_loader(num_samples=20), max_steps=4, save_every=4)
    assert make_trainer(tmp_path).fit(make_loader(num_samples=20), epochs=2).steps == 6


def test_resume_from_a_path_goes_back_and_sets_newer_checkpoints_aside(tmp_path: Path) -> None:
    whole = Losses()
    make_trainer(tmp_path, whole).fit(make_loader(), max_steps=6, save_every=2)
    back = Losses()
    path = tmp_path / "checkpoints" / "step-00000002"
    make_trainer(tmp_path, back).fit(make_loader(), max_steps=5, resume=path)
    assert back.by_step == {step: whole.by_step[step] for step in (3, 4, 5)}
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == ["abandoned-step-00000004", "abandoned-step-00000006", "step-00000002"]


def test_a_new_run_can_branch_off_another_ones_checkpoint(tmp_path: Path) -> None:
    whole, branch = Losses(), Losses()
    make_trainer(tmp_path / "one", whole).fit(make_loader(), max_steps=6, save_every=6)
    make_trainer(tmp_path / "two", branch).fit(make_loader(), max_steps=8, resume=tmp_path / "one")
    assert list(branch.by_step) == [7, 8]
    assert checkpoint.list_checkpoints(tmp_path / "one" / "checkpoints")
    assert checkpoint.list_checkpoints(tmp_path / "two" / "checkpoints") == []


def test_starting_anew_in_a_folder_with_checkpoints_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(make_loader(), max_steps=2, save_every=2)
    with pytest.raises(ConfigError, match="holds checkpoints up to step 2"):
        make_trainer(tmp_path).fit(make_loader(), max_steps=4, resume=None)


def test_a_corrupt_newest_checkpoint_is_refused_before_training_and_the_older_one_works(
    tmp_path: Path,
) -> None:
    whole, rest = Losses(), Losses()
    make_trainer(tmp_path, whole).fit(make_loader(), max_steps=6, save_every=2)
    data = tmp_path / "checkpoints" / "step-00000006" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        make_trainer(tmp_path, rest).fit(make_loader(), max_steps=6)
    assert rest.values == []
    way_out = caught.value.action.split("resume='")[1].rstrip("'.")
    make_trainer(tmp_path, rest).fit(make_loader(), max_steps=6, resume=way_out)
    assert rest.by_step == {step: whole.by_step[step] for step in (5, 6)}


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(make_loader(), max_steps=2, save_every=2)
    (tmp_path / "checkpoints" / ".step-00000003.partial").mkdir()
    losses = Losses()
    make_trainer(tmp_path, losses).fit(make_loader(), max_steps=4)
    assert list(losses.by_step) == [3, 4]


def test_the_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(make_loader(), max_steps=2, save_every=2)
    with pytest.raises(CheckpointError, match=r"SGD|momentum"):
        make_trainer(tmp_path, optimizer=partial(torch.optim.SGD, lr=0.1)).fit(make_loader(), max_steps=4)


def test_a_changed_seed_is_said_to_have_no_effect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, seed=1).fit(make_loader(), max_steps=2, save_every=2)
    make_trainer(tmp_path, seed=2).fit(make_loader(), max_steps=3)
    assert "seed=2 has no effect" in capfd.readouterr().err
