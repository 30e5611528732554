"""The GPT: causal, shifted, deterministic, and able to learn."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from mlsys_engine.errors import ConfigError
from mlsys_engine.models import GPT, GPTConfig
from mlsys_engine.models.gpt import rotate

SMALL = GPTConfig(vocab_size=17, context_length=12, num_layers=2, num_heads=2, width=16)


def make(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():  # parts that begin at zero would hide what they do
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int = 3, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 17, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_position_does_not_see_what_follows():
    model, ids = make(), tokens()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 17
    before, after = model(ids).logits, model(changed).logits
    # The same operations on the same numbers, up to how a matrix product groups them.
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_a_position_sees_all_that_came_before():
    model = make().double()
    ids = tokens()
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 17
    assert (model(ids).logits[:, -1] != model(changed).logits[:, -1]).any(dim=-1).all()


def test_the_loss_is_the_mean_over_shifted_labels_that_count():
    model, ids = make(), tokens()
    labels = ids.clone()
    labels[0, 5:], labels[1, :], labels[2, 0] = -100, -100, -100
    output = model(ids, labels)
    by_hand = [
        F.cross_entropy(output.logits[row, t], labels[row, t + 1])
        for row in range(3)
        for t in range(11)
        if labels[row, t + 1] != -100
    ]
    assert len(by_hand) == 4 + 11
    # A mean of 15 float32 numbers of size 3: rounding of a few units in the last place.
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean(), rtol=1e-6, atol=0)


def test_without_labels_there_is_no_loss():
    assert make()(tokens()).loss is None


def test_an_input_may_be_shorter_but_not_longer_than_the_context():
    model = make()
    assert model(tokens(length=1)).logits.shape == (3, 1, 17)
    with pytest.raises(ConfigError, match=r"13 tokens .*context_length=12"):
        model(tokens(length=13))


def test_the_first_loss_is_close_to_guessing():
    torch.manual_seed(0)
    ids = tokens()
    assert GPT(SMALL)(ids, ids).loss.item() == pytest.approx(math.log(17), rel=0.05)


def test_every_parameter_of_a_new_model_has_a_gradient_that_is_not_zero():
    torch.manual_seed(0)
    model = GPT(SMALL)
    model(tokens(), tokens()).loss.backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not silent


def test_a_seed_names_the_initial_weights():
    torch.manual_seed(3)
    first = GPT(SMALL).state_dict()
    torch.manual_seed(3)
    second = GPT(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tied_embeddings_are_one_parameter():
    model = make(tied_embeddings=True)
    assert model.head.weight is model.embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "embedding.weight" in names
    assert "head.weight" not in names


def test_training_repeats_bit_for_bit_and_learns():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model, ids = GPT(SMALL), tokens(8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = []
        for _ in range(30):
            loss = model(ids, ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_dropout_works_in_training_only():
    model = make(dropout=0.5)
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)


def test_the_model_holds_no_buffers_and_repeats_one_block():
    model = make()
    assert not list(model.buffers())
    assert {type(block) for block in model.blocks} == {type(model.blocks[0])}
    assert len(model.blocks) == 2


def test_rotation_keeps_length_and_dot_products_depend_on_distance_alone():
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at_every_position = rotate(torch.stack((query, key))[:, None, None, None].expand(2, 10, 1, 1, 8), 100.0)
    queries, keys = at_every_position[:, :, 0, 0]
    # The angles are float32: dot products of 8 numbers of size 1 agree to about 8 * 10 * 2^-24.
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(10), rtol=0, atol=5e-6)
    products = queries @ keys.T
    torch.testing.assert_close(products[2, 0], products[9, 7], rtol=0, atol=5e-6)
    assert not torch.isclose(products[2, 0], products[3, 0])


def test_a_model_in_bfloat16_keeps_its_loss_in_float32():
    output = make().bfloat16()(tokens(), tokens())
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"width": 18}, "multiple of 4"),
        ({"num_heads": 3}, "multiple of 6"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"rotary_base": 1.0}, "rotary_base=1.0"),
    ],
)
def test_an_impossible_size_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(SMALL, **changes)
