"""The local half of the canonical tree: its shape, its memory, and its agreement with any grouping."""

from __future__ import annotations

import pytest
import torch

from mlsys_engine.numerics import TreeSum


def _terms(num_terms: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_terms)
    return [torch.randn(1001, generator=generator) * 10.0 ** (index % 7) for index in range(num_terms)]


def _tree(terms: list[torch.Tensor]) -> torch.Tensor:
    """The definition: the largest power of two below the number of terms, then the rest."""
    if len(terms) == 1:
        return terms[0]
    half = 1 << (len(terms) - 1).bit_length() - 1
    return _tree(terms[:half]) + _tree(terms[half:])


def _sum(tree: TreeSum, terms: list[torch.Tensor]) -> torch.Tensor:
    for term in terms[:-1]:
        tree.add(term.clone())
    last = terms[-1].clone()
    tree.finish(last)
    return last


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16])
def test_sum_has_the_bits_of_the_definition(num_terms):
    terms, tree = _terms(num_terms), TreeSum()
    for _ in range(2):  # buffers of one sum serve the next
        assert torch.equal(_sum(tree, terms), _tree(terms))


def test_adding_in_order_gives_other_bits_so_that_the_test_above_can_fail():
    terms = _terms(8)
    in_order = terms[0].clone()
    for term in terms[1:]:
        in_order += term
    assert not torch.equal(in_order, _tree(terms))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_groups_of_a_power_of_two_do_not_change_the_bits(ranks):
    terms = _terms(8)
    each = 8 // ranks
    totals = [_sum(TreeSum(), terms[rank * each : (rank + 1) * each]) for rank in range(ranks)]
    assert torch.equal(_tree(totals), _tree(terms))


@pytest.mark.parametrize(("num_terms", "most"), [(1, 0), (2, 1), (8, 3), (9, 4), (16, 4)])
def test_it_keeps_at_most_log2_of_the_terms(num_terms, most):
    tree = TreeSum()
    _sum(tree, _terms(num_terms))
    assert tree.num_buffers <= most


def test_a_cancelled_sum_leaves_nothing_behind():
    terms, tree = _terms(4), TreeSum()
    tree.add(torch.full_like(terms[0], 1e9))
    tree.cancel()
    assert torch.equal(_sum(tree, terms), _tree(terms))
