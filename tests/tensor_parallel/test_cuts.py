"""The algebra of cuts through views and broadcasts."""

from __future__ import annotations

from mlsys_engine.tensor_parallel.cuts import Cut, Factor, common_factors, plain, regroup


def test_a_view_into_heads_moves_the_cut_to_the_heads():
    cut = Cut(places={})
    layout = (*plain((2, 5)), (Factor(24, cut),))
    assert regroup(layout, (2, 5, 4, 6), 2) == (*plain((2, 5)), (Factor(4, cut),), (Factor(6),))
    assert regroup(layout, (10, 24), 2) == ((Factor(2), Factor(5)), (Factor(24, cut),))


def test_a_view_into_heads_that_the_size_does_not_divide_asks_for_segments():
    cut = Cut(places={})
    assert isinstance(regroup(((Factor(24, cut),),), (3, 8), 2), str)
    assert cut.wanted_segments == (8, 8, 8)


def test_a_view_into_its_segments_keeps_the_cut_within_each():
    cut = Cut(places={})
    layout = ((Factor(24, cut, (8, 8, 8)),),)
    assert regroup(layout, (3, 8), 2) == ((Factor(3),), (Factor(8, cut),))
    assert isinstance(regroup(layout, (4, 6), 2), str)


def test_merging_batch_and_heads_keeps_the_cut_inside_and_splits_back():
    cut = Cut(places={})
    layout = (*plain((3,)), (Factor(4, cut),), *plain((5, 6)))
    merged = regroup(layout, (12, 5, 6), 2)
    assert merged == ((Factor(3), Factor(4, cut)), *plain((5, 6)))
    assert regroup(merged, (3, 4, 30), 2) == (*plain((3,)), (Factor(4, cut),), (Factor(5), Factor(6)))


def test_grouped_heads_line_up_with_the_queries_that_read_them():
    queries, keys = Cut(places={}), Cut(places={})
    dims = [(Factor(4, queries),), (Factor(2, keys), Factor(2))]
    assert common_factors(dims, 2) == [(Factor(2, queries), Factor(2)), (Factor(2, keys), Factor(2))]
    assert isinstance(common_factors([(Factor(4, queries),), (Factor(6, keys),)], 2), str)


def test_joined_cuts_are_one_and_keep_the_first_reason():
    first, second = Cut(places={("a", 0): ()}), Cut(places={("b", 0): ()})
    second.fail("read whole")
    first.join(second)
    first.join(second)
    assert second.root() is first
    assert (first.reason, set(first.places)) == ("read whole", {("a", 0), ("b", 0)})
