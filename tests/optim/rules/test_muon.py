"""Muon: which parameters it takes, its products, torch's own Muon, and precisions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.models import GPT, GPTConfig
from mlsys_engine.optim import AdamW, Muon
from mlsys_engine.optim.rules.orthogonal import COEFFICIENTS, newton_schulz
from tests.optim.variants import EPSILON, gradients_for


def matrices(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(step: int, *families: list[nn.Parameter]) -> None:
    for family in families:
        for number, parameter in enumerate(family):
            (parameter.grad,) = gradients_for(tuple(parameter.shape), 1, seed=100 * step + number)


# ---- groups


def test_hidden_matrices_go_to_muon_and_embeddings_heads_and_vectors_to_adamw() -> None:
    model = GPT(GPTConfig(vocab_size=32, context_length=8, num_layers=1, num_heads=2, width=8))
    optimizer = Muon(model.named_parameters(), lr=0.02, adamw_lr=3e-4, adamw_weight_decay=0.0)
    ours, others = optimizer.param_groups
    assert (ours["use_muon"], ours["lr"], ours["weight_decay"]) == (True, 0.02, 0.1)
    assert (others["use_muon"], others["lr"], others["weight_decay"]) == (False, 3e-4, 0.0)
    assert others["eps"] == 1e-8
    assert all("blocks." in name and parameter.ndim == 2 for name, parameter in named(ours))
    assert {"embedding.weight", "head.weight"} <= {name for name, _ in named(others)}
    assert len(ours["params"]) + len(others["params"]) == len(list(model.parameters()))


def named(group: dict[str, Any]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(group["param_names"], group["params"], strict=True))


def test_a_group_may_say_itself_who_steps_it() -> None:
    head, layer, bias = matrices((3, 4), (4, 4), (4,))
    optimizer = Muon([
        {"params": [("head.weight", head)], "use_muon": True},
        {"params": [("layer.weight", layer)], "use_muon": False, "lr": 0.5},
    ])  # fmt: skip
    first, second = optimizer.param_groups
    assert (first["use_muon"], first["lr"], second["use_muon"], second["lr"]) == (True, 1e-3, False, 0.5)
    with pytest.raises(ConfigError, match=r"shape \(4,\).*use_muon=True"):
        optimizer.add_param_group({"params": [("bias", bias)], "use_muon": True})
    optimizer.add_param_group({"params": [("bias", bias)]})
    assert optimizer.param_groups[-1]["use_muon"] is False


def test_its_adamw_groups_step_with_the_bits_of_adamw_and_may_be_narrow() -> None:
    ours, theirs = matrices((7,), (9,)), matrices((7,), (9,))
    muon = Muon(
        [{"params": ours, "use_muon": False, "moments": "int8"}], adamw_lr=1e-2, adamw_weight_decay=0.1
    )
    adamw = AdamW(theirs, lr=1e-2, weight_decay=0.1, moments="int8")
    for step in range(3):
        set_gradients(step, ours, theirs)
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_edits_of_groups_between_steps_are_noticed() -> None:
    ours, theirs = matrices((4, 4), (4, 4), (5, 3)), matrices((4, 4), (4, 4), (5, 3))
    one, two = Muon(ours[:2], lr=0.1), Muon(theirs, lr=0.1)
    for step in range(4):
        set_gradients(step, ours, theirs)
        if step == 2:
            one.add_param_group({"params": [ours[2]], "lr": 0.05})
        if step < 2:
            theirs[2].grad = None
        one.step()
        two.step()
        one.param_groups[0]["lr"] = two.param_groups[0]["lr"] = 0.05
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- the products


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 4, 20), (2, 20, 4)])
def test_orthogonalisation_gives_the_singular_vectors_with_values_near_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    rank = min(shape[-2:])
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(0.2, 1.0, rank)
    result = newton_schulz(u * values @ vh, COEFFICIENTS, 1e-7, 5, torch.float32)
    inside = u.mT @ result @ vh.mT  # diagonal, since an odd polynomial keeps the vectors
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    # The five quintics take (0.05, 1] to (0.65, 1.25); fp32 leaves 3.45^5 roundings off the diagonal.
    assert ((diagonal > 0.65) & (diagonal < 1.25)).all()
    assert (inside - torch.diag_embed(diagonal)).abs().max() <= 3.45**5 * 20 * EPSILON


def test_zeros_stay_zero_and_a_bad_matrix_spoils_no_other() -> None:
    batch = torch.stack([torch.zeros(4, 4), torch.eye(4), torch.full((4, 4), torch.nan)])
    result = newton_schulz(batch, COEFFICIENTS, 1e-7, 5, torch.float32)
    assert not result[0].any()
    assert result[1].isfinite().all()
    assert result[2].isnan().all()


# ---- torch.optim.Muon


def test_steps_agree_with_torchs_muon_in_its_precision_and_state_moves_both_ways() -> None:
    # Orthogonal momenta, so that the products amplify no rounding: singular values begin at 1/sqrt(8), where
    # a quintic's slope is below 3.45, and stay on its plateau, slope below 1.7. Five rounds of three products
    # in bfloat16, each off by 2^-8 of values below 1.3, are off by less than 5 * 3 * 1.3 * 1.7 * 2^-8 in
    # norm.
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    ours, theirs = matrices((8, 8)), matrices((8, 8))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
    optimizer = Muon(ours, ns_dtype=torch.bfloat16, **options)
    peer = torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for parameter in (*ours, *theirs):
            parameter.grad = basis.clone()
        optimizer.step()
        peer.step()
    bound = 3 * 0.1 * 5 * 3 * 1.3 * 1.7 * 2.0**-8
    assert (ours[0] - theirs[0]).norm() <= bound
    assert (ours[0] - matrices((8, 8))[0]).norm() > 3 * bound  # it could fail
    mine, other = optimizer.state_dict(), peer.state_dict()
    assert mine["state"][0].keys() == other["state"][0].keys()
    buffers = [saved["state"][0]["momentum_buffer"] for saved in (mine, other)]
    assert torch.allclose(*buffers, rtol=1e-5)
    assert set(mine["param_groups"][0]) >= set(other["param_groups"][0])
    peer.load_state_dict(copy.deepcopy(mine))
    optimizer.load_state_dict(copy.deepcopy(other))
    optimizer.step()
    peer.step()
    assert (ours[0] - theirs[0]).norm() <= bound * 4 / 3


# ---- forms and precisions


def test_matrices_of_one_shape_with_and_without_gradients_and_convolutions_step() -> None:
    ours, alone = (
        matrices((3, 4), (3, 4), (3, 4), (5, 2, 3, 3)),
        matrices((3, 4), (3, 4), (3, 4), (5, 2, 3, 3)),
    )
    together, apart = Muon(ours, lr=0.1), [Muon([parameter], lr=0.1) for parameter in alone]
    kept = ours[1].detach().clone()
    set_gradients(0, ours, alone)
    ours[1].grad = None
    together.step()
    assert torch.equal(ours[1], kept)
    assert set(together.state_dict()["state"]) == {0, 2, 3}
    for number in (0, 2, 3):
        apart[number].step()
        # A product in a batch may add in another order: 3.45^5 times a few roundings.
        assert (ours[number] - alone[number]).abs().max() <= 0.1 * 3.45**5 * 100 * EPSILON


@pytest.mark.parametrize("master", ["split", "fp32"])
def test_bf16_parameters_step_like_float32_ones_through_their_masters(master: str) -> None:
    wide = matrices((6, 6), (6,))
    for parameter in wide:
        parameter.data = parameter.data.bfloat16().float()
    narrow = [nn.Parameter(parameter.detach().bfloat16()) for parameter in wide]
    one, two = Muon(wide, lr=0.01), Muon(narrow, lr=0.01, master=master)
    for step in range(4):
        set_gradients(step, wide)
        for a, b in zip(wide, narrow, strict=True):
            assert a.grad is not None
            a.grad = a.grad.bfloat16().float()
            b.grad = a.grad.bfloat16()
        one.step()
        two.step()
    saved = two.state_dict()["state"]
    masters = [saved[index]["master"] for index in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(wide, masters, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "int8"}, "momentum is float32"),
        ({"ns_steps": 100}, "From 0 to 99"),
        ({"ns_steps": 2.5}, "From 0 to 99"),
        ({"ns_coefficients": (1.5, -0.5)}, "Three are expected"),
        ({"adjust_lr_fn": "other"}, "match_rms_adamw"),
        ({"momentum": 1.0}, "momentum=1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Muon(matrices((3, 3)), **options)


def test_a_bad_gradient_is_refused_before_anything_changes() -> None:
    layer, table = matrices((3, 3), (4, 3))
    optimizer = Muon([("layer", layer), ("embedding", table)], lr=0.1)
    before = layer.detach().clone()
    layer.grad, table.grad = torch.ones(3, 3), torch.ones(4, 3).to_sparse()
    with pytest.raises(ConfigError, match="gradient of embedding"):
        optimizer.step()
    assert torch.equal(layer, before)


@pytest.mark.parametrize("precision", [{}, {"master": "fp32"}, {"ema": 0.9}])
def test_a_narrow_matrix_goes_on_from_a_state_with_the_bits_it_had(precision: dict[str, Any]) -> None:
    def step(params: list[nn.Parameter], optimizer: Muon, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        optimizer.step()

    first, second = ([nn.Parameter(torch.ones(9, 5).bfloat16())] for _ in range(2))
    ours, again = (Muon(params, lr=0.01, **precision) for params in (first, second))
    for number in range(4):
        step(first, ours, number)
    second[0].data.copy_(first[0])
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for number in range(4, 8):
        step(first, ours, number)
        step(second, again, number)
        assert torch.equal(first[0], second[0])
    mine, theirs = (one.state_dict()["state"][0] for one in (ours, again))
    assert mine.keys() == theirs.keys() and "master" in mine
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
