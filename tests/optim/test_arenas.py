"""adopt(): flat arenas give the bits of loose parameters, in fewer segments; state lives there too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import FlatArena, layout_slots
from mlsys_engine.optim import OPTIMIZERS, SGD, AdamW, NativeOptimizer, clip_scale, optimizer_class
from mlsys_engine.optim.device_steps import CpuStep
from mlsys_engine.optim.segments import NUMEL_COLUMN, ArenaSegments
from tests.optim import arenas
from tests.optim.variants import elementwise_variants, make

SHAPES = ((3, 5), (0,), (17,), (1,), (5000,), (64,))


def loose_copies(named: list[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(parameter.detach().clone())) for name, parameter in named]


def table_of(optimizer: NativeOptimizer) -> torch.Tensor:
    assert optimizer._plan is not None
    ((_, part),) = optimizer._plan._parts
    assert isinstance(part, CpuStep)
    assert isinstance(part.segments, ArenaSegments)
    return part.segments.table


@pytest.mark.parametrize("named_parameters", [True, False])
@pytest.mark.parametrize(("name", "variant"), elementwise_variants())
def test_arena_gives_the_bits_of_loose_parameters_in_one_segment(
    name: str, variant: dict[str, Any], named_parameters: bool
) -> None:
    named, params, grads = arenas.build(SHAPES)
    loose = loose_copies(named)
    shown = named if named_parameters else [parameter for _, parameter in named if parameter.numel()]
    in_arena, apart = make(name, shown, variant), make(name, loose, variant)
    in_arena.adopt(params, grads)
    for step in range(5):
        for optimizer, pairs in ((in_arena, named), (apart, loose)):
            arenas.fill_gradients([parameter for _, parameter in pairs], seed=step)
            scale = clip_scale(optimizer.sum_of_squares(), 1.0)
            optimizer.step_scaled(grad_scale=scale)
    for (_, a), (_, b) in zip(named, loose, strict=True):
        assert torch.equal(a, b)
    if named_parameters:
        assert len(table_of(in_arena)) == 1
        assert table_of(in_arena)[0, 0] == params.data.data_ptr()
        assert table_of(in_arena)[0, NUMEL_COLUMN] == params.slots[-1].end


@pytest.mark.parametrize(("name", "variant"), elementwise_variants())
def test_padding_stays_zero_and_state_views_the_moment_arenas(name: str, variant: dict[str, Any]) -> None:
    named, params, grads = arenas.build(SHAPES)
    optimizer = make(name, named, variant)
    optimizer.adopt(params, grads)
    for step in range(3):
        arenas.fill_gradients([parameter for _, parameter in named], seed=step)
        optimizer.step()
    padding = torch.ones_like(params.data, dtype=torch.bool)
    for slot in params.slots:
        padding[slot.offset : slot.end] = False
    assert padding.any()
    (arena,) = optimizer._adopted
    for moment in optimizer.moment_names(optimizer.param_groups[0]):
        flat = arena.moments(moment).data
        # Adagrad's sum begins with a value of its own, in the padding too, where the gradient is zero.
        assert (flat[padding] == variant.get("initial_accumulator_value", 0.0)).all()
        for (_, parameter), slot in zip(named, params.slots, strict=True):
            assert optimizer.state[parameter][moment].data_ptr() == flat[slot.offset : slot.end].data_ptr()
    assert (params.data[padding] == 0).all()


@pytest.mark.parametrize(("name", "variant"), elementwise_variants())
def test_load_copies_into_the_arenas_whether_adopted_before_or_after(
    name: str, variant: dict[str, Any]
) -> None:
    named, _, _ = arenas.build(SHAPES)
    origin = make(name, named, variant)
    for step in range(3):
        arenas.fill_gradients([parameter for _, parameter in named], seed=step)
        origin.step()
    saved = copy.deepcopy(origin.state_dict())
    values = [parameter.detach().clone() for _, parameter in named]
    results = []
    for adopt_first in (True, False):
        again, new_params, new_grads = arenas.build(SHAPES)
        for (_, parameter), value in zip(again, values, strict=True):
            parameter.data.copy_(value)
        optimizer = make(name, again, variant)
        if adopt_first:
            optimizer.adopt(new_params, new_grads)
        optimizer.load_state_dict(copy.deepcopy(saved))
        if not adopt_first:
            optimizer.adopt(new_params, new_grads)
        else:
            for moment in optimizer.moment_names(optimizer.param_groups[0]):
                home = optimizer._adopted[0].moments(moment).data
                assert optimizer.state[again[0][1]][moment].data_ptr() == home.data_ptr()
        arenas.fill_gradients([parameter for _, parameter in again], seed=7)
        optimizer.step()
        results.append([parameter for _, parameter in again])
    arenas.fill_gradients([parameter for _, parameter in named], seed=7)
    origin.step()
    for result in results:
        for (_, a), b in zip(named, result, strict=True):
            assert torch.equal(a, b)


def test_groups_and_missing_gradients_divide_the_arena_into_segments() -> None:
    named, params, grads = arenas.build(((8,), (8,), (16,), (16,), (4,)))
    optimizer = AdamW(
        [
            {"params": named[:2]},
            {"params": named[2:], "weight_decay": 0.0},
        ]
    )
    optimizer.adopt(params, grads)
    arenas.fill_gradients([parameter for _, parameter in named], seed=0)
    optimizer.step()
    assert len(table_of(optimizer)) == 2
    kept = named[3][1].grad
    named[3][1].grad = None
    optimizer.step()
    assert len(table_of(optimizer)) == 3
    named[3][1].grad = kept
    optimizer.step()  # its step count is one behind now, so it is a segment of its own
    assert len(table_of(optimizer)) == 4


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if optimizer_class(name).elementwise])
def test_gradients_that_left_the_arena_are_stepped_as_loose_ones_and_may_come_back(name: str) -> None:
    named, params, grads = arenas.build(SHAPES)
    loose = loose_copies(named)
    in_arena, apart = make(name, named, {"lr": 0.1}), make(name, loose, {"lr": 0.1})
    in_arena.adopt(params, grads)
    for step, where in enumerate(("arena", "away", "partly", "arena")):
        for number, ((_, a), (_, b)) in enumerate(zip(named, loose, strict=True)):
            away = where == "away" or (where == "partly" and number == 2)
            a.grad = None if away else grads.view(grads.slots[number])
            arenas.fill_gradients([a], seed=10 * step + number)
            arenas.fill_gradients([b], seed=10 * step + number)
        in_arena.step()
        apart.step()
    for (_, a), (_, b) in zip(named, loose, strict=True):
        assert torch.equal(a, b)


def test_state_that_exists_before_adoption_moves_into_the_arena() -> None:
    named, params, grads = arenas.build(SHAPES)
    loose = loose_copies(named)
    late, never = (SGD(pairs, lr=0.1, momentum=0.9) for pairs in (named, loose))
    for step in range(4):
        if step == 2:
            late.adopt(params, grads)
        for optimizer, pairs in ((late, named), (never, loose)):
            arenas.fill_gradients([parameter for _, parameter in pairs], seed=step)
            optimizer.step()
    for (_, a), (_, b) in zip(named, loose, strict=True):
        assert torch.equal(a, b)


def test_several_arenas_and_loose_parameters_step_together() -> None:
    first, params_a, grads_a = arenas.build(((5,), (7,)), seed=1)
    second, params_b, grads_b = arenas.build(((9,),), seed=2)
    extra = torch.nn.Parameter(torch.ones(3))
    everything = [p for _, p in first] + [p for _, p in second] + [extra]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in everything]
    optimizer, plain = AdamW(everything), AdamW(copies)
    optimizer.adopt(params_a, grads_a)
    optimizer.adopt(params_b, grads_b)
    for step in range(3):
        arenas.fill_gradients(everything, seed=step)
        arenas.fill_gradients(copies, seed=step)
        optimizer.step()
        plain.step()
    for a, b in zip(everything, copies, strict=True):
        assert torch.equal(a, b)


def test_arenas_that_do_not_fit_are_refused() -> None:
    named, params, grads = arenas.build(SHAPES)
    optimizer = AdamW(named)
    with pytest.raises(ConfigError, match="different layouts"):
        optimizer.adopt(params, FlatArena.build(layout_slots([("p0", (3,))], torch.float32), torch.float32))
    named[0][1].data = named[0][1].data.clone()
    with pytest.raises(ConfigError, match="p0 does not live in its slot"):
        optimizer.adopt(params, grads)
