"""The runtime on unchanged models, cut by pipeline.partial, against serial accumulation in one process."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist

from mlsys_engine.numerics import call_model, loss_sum_and_count
from mlsys_engine.pipeline import split
from mlsys_engine.pipeline.partial import StagePart, find_units
from mlsys_engine.pipeline.runtime import PipelineAccumulation, PlannedSchedule, find_ties, stage_of
from mlsys_engine.pipeline.runtime.cut import cut
from mlsys_engine.pipeline.runtime.random_state import restored, seed_microbatch
from mlsys_engine.pipeline.schedules import SCHEDULES
from tests.pipeline.cases import TWO_STAGES
from tests.pipeline.runtime.cases import Gradients

WORDS = 101


def _gpt2(transformers):
    config = transformers.GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=WORDS, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def _llama(transformers):
    config = transformers.LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _t5(transformers):
    config = transformers.T5Config(
        num_layers=2,
        num_decoder_layers=2,
        d_model=32,
        d_ff=48,
        num_heads=2,
        d_kv=16,
        vocab_size=WORDS,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"gpt2": _gpt2, "llama": _llama, "t5": _t5}


def _batch(rows, length, seed):
    ids = torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _forward(model, batch):
    return loss_sum_and_count(call_model(model, batch, with_loss=False), batch, None)


def _serial(model, microbatches):
    base, total = int(torch.randint(2**62, ())), torch.zeros((), dtype=torch.float64)
    with restored(torch.device("cpu")):
        for index, microbatch in enumerate(microbatches):
            seed_microbatch(base, index)
            loss, _ = _forward(model, microbatch)
            loss.backward()
            total += loss.detach()
    return total


def _differences(rank, world_size, name, schedule, dtype):
    import transformers

    torch.manual_seed(0)
    model = MODELS[name](transformers).to(dtype).train()
    alone = copy.deepcopy(model)
    num_stages = 4 if schedule in TWO_STAGES else 2
    units = find_units(model, _batch(2, 8, 0), partial(call_model, with_loss=False))
    stages = split.balanced(units.names, units.blocks, dict.fromkeys(units.blocks, 1.0), num_stages)
    planned = PlannedSchedule(schedule, stages=num_stages, ranks=world_size, pieces=4)
    own = [stage for stage, on in enumerate(planned.placement) if on == rank]
    run = PipelineAccumulation(
        schedule=planned,
        model=model,
        parts={stage: StagePart(model, stage, stages, num_stages, units.escapes) for stage in own},
        group=dist.group.WORLD,
        device=torch.device("cpu"),
        gradients=Gradients(),
        stage_of_bucket=(),
        ties=find_ties(model, stages),
    )
    different = []
    for step, shape in enumerate([(7, 8), (7, 8), (4, 12)]):  # ragged, and another length
        batch = _batch(*shape, seed=step)
        for each in (model, alone):
            each.zero_grad(set_to_none=True)
        torch.manual_seed(step)
        expected = _serial(alone, cut(batch, 4))
        torch.manual_seed(step)
        loss, _ = run.run([batch], partial(_forward, model), lambda phase: None)
        dist.all_reduce(loss)
        different += [] if torch.equal(loss, expected) else [(step, "loss")]
        found = dict(model.named_parameters(remove_duplicate=False))
        different += [
            (step, key)
            for key, parameter in alone.named_parameters(remove_duplicate=False)
            if planned.placement[stage_of(key, stages)] == rank
            and not torch.equal(parameter.grad, found[key].grad)
        ]
    return different


def test_a_tied_gpt2_in_a_v_with_split_backwards_has_the_bits_of_one_process(run_ranks):
    pytest.importorskip("transformers")
    assert run_ranks(_differences, 2, "gpt2", "zb-v", torch.float32) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_unchanged_models_have_the_bits_of_one_process_under_every_schedule(run_ranks, name, schedule, dtype):
    pytest.importorskip("transformers")
    assert run_ranks(_differences, 2, name, schedule, dtype) == [[], []]
