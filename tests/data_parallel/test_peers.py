"""Against what people use today: DDP with torch.optim.AdamW, and one process that sees the whole batch."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm, models, optim, strategies
from tests.support import ranks

NUM_STEPS, LEARNING_RATE = 50, 2e-3
VOCABULARY, CONTEXT, ROWS = 64, 16, 2
# Equality with a peer, relative: the project's promise. Measured: some 1e-7, roundings in fp32.
PROMISE = 1e-5


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": CONTEXT}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0)).train()


def _tokens(step, rank):
    """Rows that count up in steps of 1 to 3, modulo the vocabulary: something that can be learnt."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start = torch.randint(0, VOCABULARY, (ROWS, 1), generator=generator)
    stride = torch.randint(1, 4, (ROWS, 1), generator=generator)
    return (start + stride * torch.arange(CONTEXT)) % VOCABULARY


def _even(step, rank):
    tokens = _tokens(step, rank)
    return {"input_ids": tokens, "labels": tokens}


def _ragged(step, rank):
    """Every rank pads different parts of its rows."""
    tokens = _tokens(step, rank)
    labels = tokens.clone()
    for row in range(ROWS):
        labels[row, 2 + (5 * rank + 3 * row + step) % (CONTEXT - 2) :] = -100
    return {"input_ids": tokens, "labels": labels}


def _wrapped(model, factory, **options):
    small_buckets = strategies.DataParallel(bucket_mib=0.02)
    return strategies.wrap(
        model, optimizer=functools.partial(factory, lr=LEARNING_RATE), strategy=small_buckets, **options
    )


def _ddp_losses(model, world_size, rank):
    """The mean over ranks of each rank's mean loss, as DDP optimizes it."""
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = ddp(**_even(step, rank)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
    return losses


def _whole_batch(model, world_size):
    """Losses and norms of one process that sees all ranks' ragged rows in one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        shares = [_ragged(step, rank) for rank in range(world_size)]
        optimizer.zero_grad()
        loss = model(**{key: torch.cat([share[key] for share in shares]) for key in shares[0]}).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def _train_gpt2(rank, world_size):
    """All trainings of one world size in one job, since importing transformers costs more than training."""
    model = _gpt2()
    found = {"ddp": _ddp_losses(copy.deepcopy(model), world_size, rank)}
    for name, factory in (("native", optim.AdamW), ("torch", torch.optim.AdamW)):
        runner = _wrapped(copy.deepcopy(model), factory, max_grad_norm=1.0)
        before = comm.counters().operations
        found[name] = [runner.step([_even(step, rank)]).loss.item() for step in range(NUM_STEPS)]
        reducer = runner.built().reducer
        found[f"{name} buckets"] = reducer.num_buckets, reducer.num_overlapped
        found[f"{name} operations"] = comm.counters().operations - before
    found["whole"], found["whole norms"] = _whole_batch(copy.deepcopy(model), world_size)
    for name, num_parts in (("ragged", 1), ("accumulated", ROWS)):
        runner = _wrapped(copy.deepcopy(model), optim.AdamW, max_grad_norm=0.5)
        results = []
        for step in range(NUM_STEPS):
            parts = {key: value.chunk(num_parts) for key, value in _ragged(step, rank).items()}
            results.append(runner.step([{key: parts[key][i] for key in parts} for i in range(num_parts)]))
        found[name] = [result.loss.item() for result in results]
        found[f"{name} norms"] = [result.grad_norm.item() for result in results]
    return found


@pytest.fixture(scope="module", params=[2, 3])
def trained(request):
    return ranks.run_ranks(_train_gpt2, request.param, timeout_s=300)


@pytest.mark.parametrize("optimizer", ["native", "torch"])
def test_gpt2_has_the_losses_of_ddp_with_adamw_for_50_steps(trained, optimizer):
    for found in trained:
        assert found[optimizer] == pytest.approx(found["ddp"], rel=PROMISE)
    assert trained[0]["ddp"][-1] < 0.8 * trained[0]["ddp"][0]  # and there is something to be equal about


@pytest.mark.parametrize("optimizer", ["native", "torch"])
def test_every_bucket_is_on_its_way_before_backward_ends(trained, optimizer):
    for found in trained:
        num_buckets, num_overlapped = found[f"{optimizer} buckets"]
        assert num_overlapped == num_buckets > 3
        assert found[f"{optimizer} operations"] > NUM_STEPS * num_buckets


@pytest.mark.parametrize("way", ["ragged", "accumulated"])
def test_ragged_labels_give_the_losses_of_one_process_over_the_whole_batch(trained, way):
    for found in trained:
        assert found[way] == pytest.approx(found["whole"], rel=PROMISE)
        # A norm follows the weights, whose differences the loss hardly shows: ten times the promise.
        assert found[f"{way} norms"] == pytest.approx(found["whole norms"], rel=10 * PROMISE)


def test_all_ranks_read_the_same_losses(trained):
    for found in trained[1:]:
        assert all(found[name] == trained[0][name] for name in ("native", "torch", "ragged", "accumulated"))


def _bits(rank, world_size, activation):
    torch.manual_seed(0)
    model = models.GPT(models.GPTConfig(vocab_size=VOCABULARY, context_length=CONTEXT, width=32, dropout=0.1))
    runner = _wrapped(model, optim.AdamW, activation=activation, max_grad_norm=1.0, seed=7)
    losses = [runner.step([_ragged(step, rank)]).loss.item() for step in range(5)]
    return losses, [parameter.detach().numpy().copy() for parameter in runner.model.parameters()]


def test_the_same_run_twice_and_with_recomputed_activations_has_the_same_bits_on_all_ranks(run_ranks):
    runs = [*run_ranks(_bits, 3, None), *run_ranks(_bits, 3, None), *run_ranks(_bits, 3, "full")]
    losses, weights = runs[0]
    for other_losses, other_weights in runs[1:]:
        assert other_losses == losses
        assert all(np.array_equal(one, other) for one, other in zip(weights, other_weights, strict=True))
