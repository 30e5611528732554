"""ModelParallel: weights cut over ranks, with the numbers of one process and a state for any other layout."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

import mlsys_engine as mls
from mlsys_engine.errors import ConfigError
from tests.data_parallel.models import alone
from tests.strategies import zoo
from tests.strategies.stacks import cross_entropy, stack, words

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW64 = functools.partial(torch.optim.AdamW, lr=0.01)
ADAMW = functools.partial(mls.optim.AdamW, lr=0.01)
STEPS = [[words(6, seed=2 * step), words(5, seed=2 * step + 1)] for step in range(3)]  # for each data rank


def _gap(found, expected):
    assert list(found) == list(expected)
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def _trained(model, strategy, optimizer, steps, **options):
    runner = mls.wrap(
        model, optimizer=optimizer, loss=cross_entropy, strategy=strategy, sample=words(), **options
    )
    return runner, [float(runner.step(step).loss) for step in steps]


def _against_alone(rank, world_size, optimizer, shard, sequence_parallel=False):
    single = alone(stack().double(), optimizer=optimizer, loss=cross_entropy, max_grad_norm=0.5)
    expected = [float(single.step(step).loss) for step in STEPS]
    if world_size == 2:
        strategy, steps = mls.ModelParallel(2, sequence_parallel=sequence_parallel), STEPS
    else:
        strategy = mls.HybridParallel(data=mls.DataParallel(shard=shard), model=2)
        steps = [[step[rank // 2]] for step in STEPS]
    runner, losses = _trained(stack().double(), strategy, optimizer, steps, max_grad_norm=0.5)
    held = sum(parameter.numel() for parameter in runner.model.parameters())
    state, whole = runner.state_dict(full=True), single.state_dict(full=True)
    kinds = next(iter(whole["optimizer"]["state"].values()))
    gaps = [_gap(state["model"], whole["model"])]
    for kind in kinds:
        found, wanted = (
            {name: torch.as_tensor(own[kind]) for name, own in each["optimizer"]["state"].items()}
            for each in (state, whole)
        )
        gaps.append(_gap(found, wanted))
    runner.close()
    gaps.append(_gap(dict(runner.model.named_parameters()), dict(single.model.named_parameters())))
    share = held / sum(parameter.numel() for parameter in runner.model.parameters())
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)), max(gaps), share


def test_values_cut_along_tokens_train_the_same(run_ranks):
    for loss, state, share in run_ranks(_against_alone, 2, ADAMW64, "none", True):
        assert loss < 1e-12
        assert state < 1e-10
        assert share < 0.7


@pytest.mark.parametrize(
    ("ranks", "optimizer", "shard"), [(2, SGD, "none"), (2, ADAMW64, "none"), (4, ADAMW64, "none")]
)
def test_weights_moments_and_losses_are_one_process_s(run_ranks, ranks, optimizer, shard):
    for loss, state, share in run_ranks(_against_alone, ranks, optimizer, shard):
        # Sums of a few hundred terms in other orders, of which AdamW divides small ones by their size.
        assert loss < 1e-12
        assert state < 1e-10
        assert share < 0.7


def test_a_sharded_optimizer_steps_the_parts(run_ranks):
    for loss, state, _ in run_ranks(_in_float32, 4):
        assert loss < 1e-5
        assert state < 1e-4


def _in_float32(rank, world_size):
    single = alone(stack(), optimizer=ADAMW, loss=cross_entropy)
    expected = [float(single.step(step).loss) for step in STEPS]
    strategy = mls.HybridParallel(data=mls.DataParallel(shard="optimizer", bucket_mib=0.004), model=2)
    runner, losses = _trained(stack(), strategy, ADAMW, [[step[rank // 2]] for step in STEPS])
    gap = _gap(runner.state_dict(full=True)["model"], single.state_dict(full=True)["model"])
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)), gap, 0


class Noisy(nn.Module):
    """Dropout on what is cut and on what is whole, the former under a checkpoint when asked."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 48), nn.Linear(16, 48), nn.Linear(48, 16)
        self.head, self._checkpointed = nn.Linear(16, 10), checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self._inner
        if self._checkpointed:
            inner = functools.partial(torch.utils.checkpoint.checkpoint, inner, use_reentrant=False)
        return self.head(functional.dropout(x + inner(x), 0.2, self.training))

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.dropout(self.up(x) * self.gate(x).sigmoid(), 0.3, self.training))


def _noisy(rank, world_size, checkpointed, sequence_parallel):
    torch.manual_seed(3)
    model, x, y = Noisy(checkpointed).double(), torch.randn(2, 3, 16).double(), torch.arange(6).view(2, 3)
    single = alone(
        copy.deepcopy(model),
        optimizer=SGD,
        loss=lambda out, batch: functional.cross_entropy(out.mT, batch[1]),
    )
    torch.manual_seed(5)
    expected = [float(single.step([(x, y)]).loss) for _ in range(3)]
    torch.manual_seed(5 + rank)  # rank 0's count
    runner = mls.wrap(
        model, optimizer=SGD, loss=lambda out, batch: functional.cross_entropy(out.mT, batch[1]),
        strategy=mls.ModelParallel(sequence_parallel=sequence_parallel), sample=(x, y),
    )  # fmt: skip
    torch.manual_seed(5)
    losses = [float(runner.step([(x, y)]).loss) for _ in range(3)]
    styles = dict(runner.plan.tensor_parallel)
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)), styles


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_drops_what_one_process_drops(run_ranks, checkpointed, sequence_parallel):
    for gap, styles in run_ranks(_noisy, 2, checkpointed, sequence_parallel):
        assert gap < 1e-12
        assert styles == {"up": "column", "gate": "column", "down": "row", "head": "column"}


def _predicts(rank, world_size):
    model = stack()
    expected = model.eval()(words(4)["x"] if isinstance(words(4), dict) else words(4)[0]).detach()
    runner = mls.wrap(model, optimizer=SGD, loss=cross_entropy, strategy=mls.ModelParallel(), sample=words())
    found = runner.predict(words(4))
    result = runner.evaluate(words(4))
    return (
        float((found - expected).abs().max()),
        type(found).__name__,
        float(result.loss_sum),
        int(result.count),
    )


def test_predictions_are_whole_and_evaluation_counts_once(run_ranks):
    for gap, kind, _, count in run_ranks(_predicts, 2):
        assert gap < 1e-5
        assert kind == "Tensor"
        assert count == 4 * 5


def test_the_plan_prints_its_styles_and_survives_json():
    plan = mls.plan(stack(), mls.ModelParallel(2), words(), world=2)
    assert "tensor parallel:" in str(plan)
    assert type(plan).from_json(plan.to_json()) == plan


def test_a_plan_tells_where_values_are_cut_along_tokens():
    plan = mls.plan(stack(), mls.ModelParallel(2, sequence_parallel=True), words(), world=2)
    assert "sequence_parallel=on" in str(plan)
    assert plan.hash != mls.plan(stack(), mls.ModelParallel(2), words(), world=2).hash


def _kept(rank, world_size, sequence_parallel):
    """Bytes that one forward of a step leaves for its backward."""
    model = stack()
    runner = mls.wrap(
        model, optimizer=SGD, loss=cross_entropy, sample=words(),
        strategy=mls.ModelParallel(sequence_parallel=sequence_parallel),
    )  # fmt: skip
    kept, seen = [0], set()
    saved_tensors_hooks = torch.autograd.graph.saved_tensors_hooks

    def counted(pack, unpack):
        def packing(tensor):
            packed = pack(tensor)
            for each in (packed, getattr(getattr(packed, "of", None), "part", None)):
                if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in seen:
                    seen.add(each.untyped_storage().data_ptr())
                    kept[0] += each.untyped_storage().nbytes()
            return packed

        return saved_tensors_hooks(packing, unpack)

    with counted(lambda tensor: tensor, lambda tensor: tensor), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", counted)
        runner.step([words(8)])
    return kept[0]


def test_values_cut_along_tokens_keep_less_for_backward(run_ranks):
    whole, cut = (max(run_ranks(_kept, 2, sequence_parallel)) for sequence_parallel in (False, True))
    assert cut < 0.85 * whole


def _planned(model, strategy, sample, world, **options):
    return lambda: mls.plan(model(), strategy, sample, world=world, **options)


@pytest.mark.parametrize(
    ("make", "words_in_error"),
    [
        (lambda: mls.ModelParallel(0), "at least 1"),
        (lambda: mls.ModelParallel(2, plan="megatron"), '"auto", "model"'),
        (lambda: mls.ModelParallel(2, sequence_parallel=1), "Use True or False"),
        (_planned(stack, mls.ModelParallel(2), words(), 4), "Launch 2 ranks"),
        (
            _planned(lambda: nn.BatchNorm1d(4), mls.ModelParallel(2), torch.zeros(2, 4), 2),
            "no weight of this",
        ),
        (_planned(zoo.llama, mls.ModelParallel(4), zoo.text(2, 8), 4), "num_key_value_heads=2"),
        (_planned(stack, mls.HybridParallel(data=2, model=2), words(), 6), "Launch 4 ranks"),
        (_planned(stack, mls.ModelParallel(2), words(), 2, compile=True), "Leave compile out"),
        (lambda: mls.HybridParallel(model=mls.ModelParallel()), "ModelParallel of no size"),
    ],
)
def test_what_cannot_be_is_refused_before_any_rank_starts(make, words_in_error):
    with pytest.raises(ConfigError, match=words_in_error):
        make()


def _lamb(rank, world_size):
    with pytest.raises(ConfigError, match="LAMB with parameters that are cut"):
        mls.wrap(stack(), optimizer=functools.partial(mls.optim.LAMB, lr=0.1), loss=cross_entropy,
                 strategy=mls.ModelParallel(), sample=words())  # fmt: skip
    return True


def test_rules_of_whole_parameters_are_refused(run_ranks):
    assert run_ranks(_lamb, 2) == [True, True]
