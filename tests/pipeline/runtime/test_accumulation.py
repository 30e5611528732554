from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from mlsys_engine.pipeline.runtime.cut import cut
from mlsys_engine.pipeline.runtime.ties import SUMMED
from mlsys_engine.pipeline.schedules import SCHEDULES
from tests.pipeline.cases import TWO_STAGES
from tests.pipeline.runtime.cases import WORDS, Cut, forward_of, pipeline, serial, unit_stages

BATCHES = ((7, 5), (7, 5), (4, 9), (3, 5), (1, 2))  # ragged, another length, fewer rows than microbatches


def _lap(phase):
    pass


def _differences(rank, world_size, case):
    """Names of gradients that differ from serial ones, and whether losses do, over some steps."""
    schedule, stages, dtype, tied, choices = case
    torch.manual_seed(0)
    own = Cut(stages, tied).to(dtype)
    alone = copy.deepcopy(own)
    run = pipeline(own, schedule, stages, choices=choices)
    different = []
    for step, shape in enumerate(BATCHES):
        batch = torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(step))
        for model in (own, alone):
            model.zero_grad(set_to_none=True)
        torch.manual_seed(100 + step)
        expected = serial(alone, cut(batch, 4))
        torch.manual_seed(100 + step)
        loss, count = run.run([batch], forward_of(own), _lap)
        found = torch.stack([loss, count])
        dist.all_reduce(found)
        if not torch.equal(found, torch.stack([expected, torch.tensor(float(batch.numel())).double()])):
            different.append((step, "loss", float(found[0] - expected)))
        placed = unit_stages(stages)
        names = dict(own.named_parameters(remove_duplicate=False))
        for name, parameter in alone.named_parameters(remove_duplicate=False):
            stage = next(placed[unit] for unit in placed if name.startswith(f"{unit}."))
            mine = run._executor._placement[stage] == rank
            if mine and not _equal(parameter.grad, names[name].grad, choices):
                different.append((step, name))
            if not mine and not tied and names[name].grad is not None:
                different.append((step, f"{name} of another rank"))
    return different


def _equal(expected, found, choices):
    if found is None or not choices:
        return found is not None and torch.equal(expected, found)
    return torch.allclose(expected, found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_bits_of_serial_accumulation(run_ranks, schedule):
    stages = 4 if schedule in TWO_STAGES else 2
    for dtype, tied in ((torch.float32, True), (torch.float64, False)):
        assert run_ranks(_differences, 2, (schedule, stages, dtype, tied, None)) == [[], []]


def test_four_ranks_with_two_stages_each_give_the_bits_of_serial_accumulation(run_ranks):
    for schedule in ("interleaved-1f1b", "zb-v"):
        case = (schedule, 8, torch.float32, True, None)
        assert run_ranks(_differences, 4, case) == [[], [], [], []]


def test_tied_gradients_that_are_summed_once_a_step_differ_by_rounding_alone(run_ranks):
    # Terms of magnitude up to 100 in float64: 1e-10 is far above their rounding, far below a lost term.
    case = ("1f1b", 2, torch.float64, True, {"embed.weight": SUMMED})
    assert run_ranks(_differences, 2, case) == [[], []]


def _evaluated_and_predicted(rank, world_size):
    torch.manual_seed(0)
    own = Cut(4, True)
    alone = copy.deepcopy(own).eval()
    run = pipeline(own, "zb-v", 4)
    own.eval()
    batch = torch.randint(0, WORDS, (7, 5))
    totals = torch.stack(run.evaluate(batch, forward_of(own)))
    dist.all_reduce(totals)
    with torch.no_grad():
        parts = [forward_of(alone)(piece) for piece in cut(batch, 4)]
        expected = torch.stack([sum(part[0].double() for part in parts), sum(part[1] for part in parts)])
        output = {"logits": (alone(batch), 3)}
    found = run.predict(batch, lambda batch: {"logits": (own(batch), 3)})
    same = torch.equal(found["logits"][0], output["logits"][0]) and found["logits"][1] == 3
    return torch.equal(totals, expected), same, found["logits"][0].requires_grad


def test_evaluation_and_prediction_go_through_the_stages_and_reach_every_rank(run_ranks):
    assert run_ranks(_evaluated_and_predicted, 2) == [(True, True, False)] * 2


def _raise_in_the_third_step(rank, world_size):
    torch.manual_seed(0)
    own = Cut(2, False)
    run = pipeline(own, "1f1b", 2)
    forward = forward_of(own)
    for step in range(3):
        if step == 2 and rank == 1:

            def forward(batch):
                raise ValueError("the third step")

        run.run([torch.zeros(8, 600, dtype=torch.long)], forward, _lap)


def test_a_rank_that_raises_in_its_stage_ends_the_others_instead_of_leaving_them_waiting(
    run_ranks_collecting,
):
    first, second = run_ranks_collecting(_raise_in_the_third_step, 2, timeout_s=30)
    assert "ValueError: the third step" in second.error
    assert "PeerFailedError" in first.error


def _other_batches(rank, world_size):
    run = pipeline(Cut(2, False), "1f1b", 2)
    run.run([torch.zeros(4 - rank, 5, dtype=torch.long)], forward_of(run._model), _lap)


def test_ranks_of_a_pipeline_that_are_fed_differently_are_told(run_ranks_collecting):
    _, second = run_ranks_collecting(_other_batches, 2, timeout_s=30)
    assert "every rank of a pipeline is given the same batches" in second.error
