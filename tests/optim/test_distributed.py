"""DTensor parameters: FSDP2, HSDP and two-dimensional meshes, over the native group and over gloo."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import OPTIMIZERS, AdamW, LossScaler, clip_scale, optimizer_class, step_in_backward
from tests.optim.peers import TORCH_PEERS, make_peer
from tests.optim.sharded_model import loss_of, model
from tests.optim.variants import ELEMENTWISE, VARIANTS, gradients_for, make


def _backward(net: nn.Module, step: int, rank: int, world_size: int) -> None:
    loss_of(net, step, rank, world_size).backward()


def _joined(backend: str, rank: int, world_size: int) -> None:
    """gloo is joined by hand: run_ranks(init=True) makes it impossible, which proves that mlsys was used."""
    if backend == "gloo":
        dist.init_process_group("gloo", rank=rank, world_size=world_size)


# ---- training with clipping


def _clips_as_torch(rank: int, world_size: int, backend: str) -> None:
    _joined(backend, rank, world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for name in TORCH_PEERS:
        variant = VARIANTS[name][-1]
        ours, theirs = model(mesh), model(mesh)
        optimizer, peer = (
            make(name, ours.parameters(), variant),
            make_peer(name, theirs.parameters(), variant),
        )
        for step in range(4):
            loss_of(ours, step, rank, world_size).backward()
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                other.grad = mine.grad.clone()
            total = optimizer.sum_of_squares()
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).full_tensor()
            # float32 squares and sums of fewer than 128 terms: 128 roundings of the sum, half in its root.
            assert abs(total.sqrt() - norm) <= 64 * 2.0**-24 * norm
            optimizer.step_scaled(grad_scale=clip_scale(total, 0.1))
            peer.step()
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                # Gradients differ by the norm's error alone (2^-18); a normalised update, whose moments see
                # the same relative error at every step, differs by at most a few times that, and the
                # parameter rounds as one does in the contract test. Data is well away from zero divisions.
                bound = 8 * 2.0**-18 * variant["lr"] * (step + 1) + 16 * 2.0**-24 * (1.0 + other.abs())
                assert ((mine - other).abs() <= bound).to_local().all(), (name, step)
                with torch.no_grad():
                    mine.copy_(other)
            optimizer.zero_grad()
            peer.zero_grad()
        for mine, other in zip(optimizer.state.values(), peer.state.values(), strict=True):
            assert mine.keys() == other.keys()
            for key in mine:
                assert type(mine[key]) is type(other[key])
                assert mine[key].shape == other[key].shape


@pytest.mark.parametrize("backend", ["mlsys", pytest.param("gloo", marks=pytest.mark.slow)])
def test_clipped_steps_of_an_fsdp2_model_equal_torchs(run_ranks: Any, backend: str) -> None:
    run_ranks(_clips_as_torch, 2, backend, init=backend == "mlsys")


# ---- shards step with the bits of the whole


def _shards_step_as_the_whole(rank: int, world_size: int) -> None:
    line = init_device_mesh("cpu", (world_size,))
    layouts: list[tuple[tuple[int, ...], Any]] = [
        ((9, 3), [Shard(0)]),
        ((3, 8), [Shard(1)]),
        ((1, 4), [Shard(0)]),  # nothing on the second rank
        ((6,), [Replicate()]),
        ((), [Replicate()]),
        ((4100, 3), [Shard(0)]),
    ]
    for name in ELEMENTWISE:
        generator = torch.Generator().manual_seed(5)
        whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in layouts]
        shards = [
            nn.Parameter(distribute_tensor(p.detach().clone(), line, placements))
            for p, (_, placements) in zip(whole, layouts, strict=True)
        ]
        plain = nn.Parameter(torch.ones(3))
        both = make(name, [*shards, plain], VARIANTS[name][-1])
        alone = make(name, [*whole, nn.Parameter(torch.ones(3))], VARIANTS[name][-1])
        addresses = [p.to_local().data_ptr() for p in shards]
        for step in range(3):
            for number, (a, b) in enumerate(zip(shards, whole, strict=True)):
                b.grad = gradients_for(b.shape, 1, seed=100 * step + number)[0]
                a.grad = distribute_tensor(b.grad, line, layouts[number][1])
            plain.grad = torch.full((3,), 2.0)
            alone.param_groups[0]["params"][-1].grad = plain.grad
            expected = alone.sum_of_squares().item()
            # Two float64 sums of positive terms in another order: a rounding a chunk, and a few to combine.
            assert abs(both.sum_of_squares().item() - expected) <= 16 * 2.0**-53 * expected
            both.step()
            alone.step()
        for a, b in zip(shards, whole, strict=True):
            assert torch.equal(a.full_tensor(), b)
        assert [p.to_local().data_ptr() for p in shards] == addresses
        for state, other in zip(both.state.values(), alone.state.values(), strict=True):
            for key, value in state.items():
                assert torch.equal(value.full_tensor() if hasattr(value, "to_local") else value, other[key])


def test_shards_step_in_place_with_the_bits_of_the_whole(run_ranks: Any) -> None:
    run_ranks(_shards_step_as_the_whole, 2)


def _narrow_shards_step_as_the_whole(rank: int, world_size: int) -> None:
    line = init_device_mesh("cpu", (world_size,))
    # Rows of 64 elements, so that eight-bit blocks end where shards do; the last leaves a rank empty.
    shapes = ((6, 64), (5, 64), (1, 64))
    for master, moments in (("split", "fp32"), ("fp32", "bf16"), (None, "bf16"), ("split", "int8")):
        options: dict[str, Any] = {"lr": 0.05, "master": master, "moments": moments, "ema": 0.9}
        generator = torch.Generator().manual_seed(5)
        whole = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
        shards = [nn.Parameter(distribute_tensor(p.detach().clone(), line, [Shard(0)])) for p in whole]
        both, alone = AdamW(shards, **options), AdamW(whole, **options)
        for step in range(4):
            for number, (a, b) in enumerate(zip(shards, whole, strict=True)):
                b.grad = gradients_for(tuple(b.shape), 1, seed=100 * step + number)[0].bfloat16()
                a.grad = distribute_tensor(b.grad, line, [Shard(0)])
            # Each within 2^-19 of the exact sum, as csrc/optim/sum_of_squares.cpp derives.
            total, expected = both.sum_of_squares(), alone.sum_of_squares()
            assert abs(total - expected) <= 2.1 * 2**-19 * expected
            both.step()
            alone.step()
            if step == 1:  # through a saved state, which has float32 DTensors
                saved = both.state_dict()
                saved["state"] = {
                    key: {item: value.clone() for item, value in state.items()}
                    for key, state in saved["state"].items()
                }
                both.load_state_dict(saved)
        for a, b in zip(shards, whole, strict=True):
            assert torch.equal(a.full_tensor(), b), (master, moments)
        left, right = both.state_dict()["state"], alone.state_dict()["state"]
        for key, state in left.items():
            assert state.keys() == right[key].keys()
            for item, value in state.items():
                held = value.full_tensor() if hasattr(value, "to_local") else value
                assert held.dtype is torch.float32
                assert torch.equal(held, right[key][item]), (master, moments, item)


def test_shards_in_narrow_forms_draw_and_round_as_the_whole(run_ranks: Any) -> None:
    run_ranks(_narrow_shards_step_as_the_whole, 2)


# ---- norms on two-dimensional meshes


def _two_dimensional_norms(rank: int, world_size: int) -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    generator = torch.Generator().manual_seed(0)
    params, expected = [], torch.zeros((), dtype=torch.float64)
    for placements in (
        [Replicate(), Shard(0)],
        [Shard(0), Shard(1)],
        [Shard(1), Replicate()],
        [Replicate(), Replicate()],
        None,
    ):
        gradient = torch.randn(5, 6, generator=generator)
        expected += gradient.double().square().sum()
        parameter = nn.Parameter(torch.zeros(5, 6))
        if placements is not None:
            parameter = nn.Parameter(distribute_tensor(torch.zeros(5, 6), mesh, placements))
            gradient = distribute_tensor(gradient, mesh, placements)
        parameter.grad = gradient
        params.append(parameter)
    net = model(mesh)  # HSDP: replicated over the first dimension
    for parameter in net.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        expected += gradient.double().square().sum()
        parameter.grad = distribute_tensor(gradient, mesh, parameter.placements)
        params.append(parameter)
    total = AdamW(params).sum_of_squares().item()
    # Squares and sums in float64 in another order: at most one rounding a term.
    assert abs(total - expected.item()) <= 400 * 2.0**-53 * expected.item()
    params[0].grad.to_local()[:] = torch.nan if rank == 1 else 0.0  # rank 3 holds the same shard
    if rank == 3:
        params[0].grad.to_local()[:] = torch.nan
    assert AdamW(params).sum_of_squares().isnan()
    return total


def test_norms_on_two_dimensional_meshes_count_replicas_once_on_all_ranks(run_ranks: Any) -> None:
    assert len(set(run_ranks(_two_dimensional_norms, 4))) == 1


def _tensor_parallel_and_fsdp2(rank: int, world_size: int) -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    nets = []
    for _ in range(2):
        torch.manual_seed(4)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 3))
        parallelize_module(net, mesh["tensor"], plan)
        for layer in (net[0], net[2], net[3]):  # the last has a mesh of one dimension, the others of two
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
        nets.append(net)
    ours, theirs = nets
    optimizer = AdamW(ours.parameters(), lr=0.05)
    peer = torch.optim.AdamW(theirs.parameters(), lr=0.05)
    addresses = [p.to_local().data_ptr() for p in ours.parameters()]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 6, generator=generator).chunk(2)[mesh.get_local_rank("data")]
        for net in nets:
            net(batch).square().mean().backward()
        total = optimizer.sum_of_squares()
        whole = sum(p.grad.full_tensor().double().square().sum() for p in ours.parameters())
        assert abs(total - whole) <= 400 * 2.0**-53 * whole  # as above
        for parameter in theirs.parameters():  # clip_grad_norm_ refuses parameters of two meshes
            parameter.grad.mul_(min(1.0, 0.1 / (whole.sqrt().item() + 1e-6)))
        optimizer.step_scaled(grad_scale=clip_scale(total, 0.1))
        peer.step()
        for net, one in zip(nets, (optimizer, peer), strict=True):
            one.zero_grad()
            assert all(p.grad is None for p in net.parameters())
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            # The bound of the clipped steps above, here without a restart at torch's weights: three steps.
            bound = 3 * (8 * 2.0**-18 * 0.05 * 3 + 16 * 2.0**-24 * (1.0 + other.to_local().abs()))
            assert ((mine.to_local() - other.to_local()).abs() <= bound).all()
    assert [p.to_local().data_ptr() for p in ours.parameters()] == addresses
    return total.item()


@pytest.mark.slow
def test_a_model_of_tensor_parallel_layers_under_fsdp2_steps_as_torchs(run_ranks: Any) -> None:
    assert len(set(run_ranks(_tensor_parallel_and_fsdp2, 4))) == 1


# ---- inside the backward


def _in_backward(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for options in ({}, {"max_grad_norm": 0.05}, {"max_grad_norm": 0.05, "clip": "two_pass"}):
        ours, theirs = model(mesh), model(mesh)
        optimizer, ordinary = (AdamW(net.parameters(), lr=0.05) for net in (ours, theirs))
        handle = step_in_backward(optimizer, **options)  # type: ignore[arg-type]
        previous = None
        for step in range(4):
            if options.get("clip") == "two_pass":
                handle.step(functools.partial(_backward, ours, step, rank, world_size))
            else:
                loss_of(ours, step, rank, world_size).backward()
            assert all(parameter.grad is None for parameter in ours.parameters())
            loss_of(theirs, step, rank, world_size).backward()
            total = ordinary.sum_of_squares()
            if not options:
                ordinary.step()
            elif "clip" in options:
                ordinary.step_scaled(grad_scale=clip_scale(total, 0.05))
            elif previous is not None:
                ordinary.step_scaled(grad_scale=clip_scale(previous, 0.05))
            previous = total
            ordinary.zero_grad()
            assert not options or torch.equal(handle.grad_norm, total.sqrt())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local()), options


def test_fsdp2_models_step_inside_the_backward_with_the_same_bits(run_ranks: Any) -> None:
    run_ranks(_in_backward, 2)


# ---- loss scales


def _scaled_losses(rank: int, world_size: int) -> None:
    """A gradient that only one rank's shard holds an inf of must make both ranks skip."""
    mesh = init_device_mesh("cpu", (world_size,))
    for scaler in (torch.amp.GradScaler("cpu", init_scale=8.0), LossScaler(init_scale=8.0)):
        ours, plain = model(mesh), model(mesh)
        optimizer, ordinary = (AdamW(net.parameters(), lr=0.05) for net in (ours, plain))
        for step in range(4):
            scaler.scale(loss_of(ours, step, rank, world_size)).backward()
            if step == 2:
                first = ours[0].weight.grad.to_local()
                first[0] = torch.inf if rank == 1 else first[0]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            loss_of(plain, step, rank, world_size).backward()
            if step != 2:
                ordinary.step()
            ordinary.zero_grad()
        assert scaler.get_scale() == 4.0
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local())  # the scale is a power of two
        assert optimizer.state[ours[0].weight]["step"] == 3


def test_a_scaled_loss_is_unscaled_and_skipped_on_all_ranks_at_once(run_ranks: Any) -> None:
    run_ranks(_scaled_losses, 2)


# ---- refusals


def _refusals(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(ConfigError, match=r"weight is .*Partial"):
        AdamW([("weight", nn.Parameter(partial))])
    for dtype in (torch.complex64, torch.float64):
        with pytest.raises(ConfigError, match="weight is"):
            AdamW([("weight", nn.Parameter(distribute_tensor(torch.ones(4, dtype=dtype), mesh, [Shard(0)])))])
    parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = AdamW([("weight", parameter)])
    parameter.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    for refused in (optimizer.step, optimizer.sum_of_squares):
        with pytest.raises(ConfigError, match=r"gradient of weight is .*Replicate.*redistribute"):
            refused()
    assert torch.equal(parameter.full_tensor(), torch.ones(4))


def test_partial_parameters_and_gradients_laid_out_otherwise_are_refused(run_ranks: Any) -> None:
    run_ranks(_refusals, 2)


# ---- rules that need whole tensors


def _tensor_rules(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    layouts: list[tuple[tuple[int, ...], Any]] = [
        ((9, 3), [Shard(0)]),
        ((3, 8), [Shard(1)]),
        ((1, 4), [Shard(0)]),
        ((6, 5), [Replicate()]),
        ((7,), [Shard(0)]),
    ]
    for name in OPTIMIZERS:
        rule = optimizer_class(name)
        if rule.elementwise:
            continue
        generator = torch.Generator().manual_seed(5)
        whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in layouts]
        shards = [
            nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements))
            for p, (_, placements) in zip(whole, layouts, strict=True)
        ]
        if not rule.steps_dtensors:
            with pytest.raises(ConfigError, match="whole tensors"):
                make(name, shards, VARIANTS[name][0])
            continue
        both, alone = make(name, shards, VARIANTS[name][-1]), make(name, whole, VARIANTS[name][-1])
        for step in range(3):
            for number, (a, b) in enumerate(zip(shards, whole, strict=True)):
                b.grad = gradients_for(tuple(b.shape), 1, seed=100 * step + number)[0]
                a.grad = distribute_tensor(b.grad, mesh, layouts[number][1])
            scale = torch.tensor(0.5, dtype=torch.float64)
            both.step_scaled(grad_scale=scale)
            both.step_scaled(skip=torch.tensor(True))
            alone.step_scaled(grad_scale=scale)
        for a, b in zip(shards, whole, strict=True):
            # torch rounds each operation where the kernel does; norms are in double in both.
            assert ((a.full_tensor() - b).abs() <= 3 * 40 * 2.0**-24 * (1.0 + b.abs())).all(), name
        for state, other in zip(both.state.values(), alone.state.values(), strict=True):
            assert state.keys() == other.keys()


@pytest.mark.slow
def test_rules_of_whole_tensors_step_dtensors_by_torch_or_refuse_them(run_ranks: Any) -> None:
    run_ranks(_tensor_rules, 2)
