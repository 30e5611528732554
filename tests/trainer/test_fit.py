"""Steps, epochs, accumulation, records and refusals of a fit in a world of one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from mlsys_engine import tracking
from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.trainer import SaveEvery
from tests.trainer import workloads
from tests.trainer.workloads import Journal, Losses, make_loader, make_trainer


def test_max_steps_counts_optimizer_steps(tmp_path: Path) -> None:
    losses = Losses()
    result = make_trainer(tmp_path, losses).fit(make_loader(), max_steps=5)
    assert result.steps == 5
    assert result.run_dir == tmp_path
    assert list(losses.by_step) == [1, 2, 3, 4, 5]
    assert result.metrics["loss"] == losses.values[-1]


@pytest.mark.parametrize(("limits", "steps"), [({"epochs": 2}, 16), ({"max_steps": 11, "epochs": 2}, 11),
                                               ({"max_steps": 99, "epochs": 1}, 8)])  # fmt: skip
def test_steps_or_epochs_whichever_ends_first(tmp_path: Path, limits: dict[str, int], steps: int) -> None:
    assert make_trainer(tmp_path).fit(make_loader(num_samples=60), **limits).steps == steps


def test_events_come_in_their_order(tmp_path: Path) -> None:
    journal = Journal()
    make_trainer(tmp_path, journal).fit(
        make_loader(num_samples=20), epochs=2, eval_loader=make_loader(), eval_every=2, save_every=4
    )
    assert journal.events == [
        "fit_start 0", "epoch_start 0 at 0", "evaluation 2", "epoch_end 0 at 3",
        "epoch_start 1 at 3", "evaluation 4", "saved step-00000004 at 4", "evaluation 6", "epoch_end 1 at 6",
        "saved step-00000006 at 6", "fit_end 6",
    ]  # fmt: skip
    assert journal.status == "completed"


def test_training_is_plain_torch_when_there_is_one_rank(tmp_path: Path) -> None:
    losses = Losses()
    make_trainer(tmp_path, losses, model=workloads.make_model(dropout=0.0), max_grad_norm=0.5,
                 optimizer=partial(torch.optim.SGD, lr=0.1)).fit(
        make_loader(shuffle=False), max_steps=8
    )  # fmt: skip
    model = workloads.make_model(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for batch in make_loader(shuffle=False):
        optimizer.zero_grad()
        loss = workloads.mean_squared_error(model(batch[0]), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    # fp32 sums of at most 8 terms are formed in another order (a sum divided by the count, not a mean).
    torch.testing.assert_close(losses.values, expected, rtol=1e-5, atol=0.0)


def test_accumulation_changes_the_memory_and_not_the_losses(tmp_path: Path) -> None:
    whole, parts = Losses(), Losses()
    for losses, accumulate in ((whole, 1), (parts, 3)):
        trainer = make_trainer(
            tmp_path / str(accumulate), losses, model=workloads.make_model(dropout=0.0), accumulate=accumulate
        )
        trainer.fit(make_loader(num_samples=60), max_steps=8)  # the last batch of the epoch is ragged
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-5, atol=0.0)


def test_seeds_decide_order_and_dropout(tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        losses = Losses()
        make_trainer(tmp_path / str(number), losses, seed=seed).fit(make_loader(), max_steps=4)
        runs.append(losses.values)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_evaluating_more_often_does_not_change_the_training(tmp_path: Path) -> None:
    never, often = Losses(), Losses()
    make_trainer(tmp_path / "never", never).fit(make_loader(), max_steps=6)
    make_trainer(tmp_path / "often", often).fit(
        make_loader(), max_steps=6, eval_loader=make_loader(shuffle=True), eval_every=1
    )
    assert never.values == often.values


def test_a_callback_stops_the_training_one_step_later_and_it_counts_as_completed(tmp_path: Path) -> None:
    class StopAtThree:
        def on_step_end(self, step: int, control: Any) -> None:
            if step == 3:
                control.stop()

    journal = Journal()
    result = make_trainer(tmp_path, StopAtThree(), journal).fit(
        make_loader(), max_steps=20, save_every=20, eval_loader=make_loader()
    )
    assert result.steps == 4
    assert journal.status == "completed"
    assert journal.events[-3:] == ["evaluation 4", "saved step-00000004 at 4", "fit_end 4"]


def test_the_record_holds_every_step_the_plan_and_the_settings(tmp_path: Path) -> None:
    losses = Losses()
    trainer = make_trainer(tmp_path, losses, trackers=("local",), max_grad_norm=2.0)
    result = trainer.fit(
        make_loader(),
        max_steps=5,
        eval_loader=make_loader(),
        record={
            "baselines": {"unigram": {"bits_per_byte": 4.0}},
            "data": {"unit": "byte", "fingerprint": "f"},
        },
    )
    record = tracking.read_run(tmp_path)
    assert record.status == "completed"
    assert record.fields["steps"] == 5
    assert record.fields["backend"] == "mlsys"
    assert record.baselines == {"unigram": {"bits_per_byte": 4.0}}
    assert record.metrics["val_bits_per_byte"] == result.metrics["val_bits_per_byte"]
    assert record.manifest["config"]["trainer"]["max_grad_norm"] == 2.0
    assert record.manifest["data"]["fingerprint"] == "f"
    assert {"code", "environment", "hardware", "threads", "plan"} <= record.manifest.keys()
    logged = [row["loss"] for row in record.read_metrics().rows if "loss" in row]
    assert logged == losses.values


def test_a_run_that_raises_is_recorded_as_failed(tmp_path: Path) -> None:
    class Fails:
        def on_step_end(self, step: int) -> None:
            if step == 2:
                raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        make_trainer(tmp_path, Fails(), trackers=("local",)).fit(make_loader(), max_steps=5)
    assert tracking.read_run(tmp_path).status == "failed"


def test_a_new_run_folder_is_made_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, trackers=("local",))
    trainer._run_dir = None
    result = trainer.fit(make_loader(), max_steps=1)
    assert tracking.find_run("latest", tmp_path / "runs").resolve() == result.run_dir.resolve()


def test_non_finite_steps_are_skipped_counted_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Poison:
        def on_step_start(self, step: int, batches: Any) -> None:
            if step == 1:
                batches[0][0][0, 0] = float("nan")

    result = make_trainer(tmp_path, Poison()).fit(make_loader(), max_steps=4)
    assert result.metrics["num_skipped"] == 1.0
    assert "step 2: loss nan" in capfd.readouterr().err


def test_both_batch_sizes_are_told_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, accumulate=2).fit(make_loader(batch_size=12), max_steps=1)
    text = capfd.readouterr().err
    assert "Global batch 12 samples a step (the loader's batch_size): 12 on each of 1 data rank" in text
    assert "in 2 microbatches; 5 steps an epoch" in text


def test_a_line_tells_loss_pace_and_time_left_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    losses = Losses()
    make_trainer(tmp_path, losses).fit(make_loader(), max_steps=3)
    last = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step 3/3")]
    assert len(last) == 1
    assert f"loss {losses.values[-1]:.4f}" in last[0]
    assert "tokens/s" in last[0]
    assert "ETA 0:00" in last[0]


def test_a_second_fit_is_refused_with_the_way_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_loader(), max_steps=1)
    with pytest.raises(ConfigError, match="same run_dir"):
        trainer.fit(make_loader(), max_steps=2)


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


def test_an_unsharded_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make_trainer(tmp_path).fit(DataLoader(_Stream(), batch_size=4), max_steps=1)


def test_a_sample_replaces_the_first_batch_for_planning(tmp_path: Path) -> None:
    sample = next(iter(make_loader(shuffle=False)))
    assert make_trainer(tmp_path, sample=sample).fit(make_loader(), max_steps=1).steps == 1


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be created"):
        make_trainer(tmp_path / "file" / "run").fit(make_loader(), max_steps=1)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(make_loader(), max_steps=7, save_every=SaveEvery(steps=2, keep_last=2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000007",
    ]


def test_a_model_in_eval_mode_trains_in_train_mode_and_is_told_so_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for name, model in (("train", workloads.make_model()), ("eval", workloads.make_model().eval())):
        journal = Losses()
        make_trainer(tmp_path / name, journal, model=model).fit(make_loader(), max_steps=3)
        assert all(module.training for module in model.modules())
        losses[name] = journal.values
    assert losses["eval"] == losses["train"]
    assert capfd.readouterr().err.count("was in eval mode") == 1


def test_submodules_keep_their_eval_mode_when_the_model_is_in_train_mode(tmp_path: Path) -> None:
    model = workloads.make_model()
    model.layers[2].eval()
    make_trainer(tmp_path, model=model).fit(make_loader(), max_steps=2, eval_loader=make_loader())
    assert model.training and not model.layers[2].training
