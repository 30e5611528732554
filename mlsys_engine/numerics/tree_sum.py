"""Sums of any number of terms in the shape of one balanced binary tree, one term at a time."""

from __future__ import annotations

import torch


class TreeSum:
    """Adds tensors of one shape as a binary counter does: equal subtrees combine as soon as both are there.

    With `n` terms in all it keeps at most log2(n) tensors beside the term at hand. The tree over n terms is
    the tree over the largest power of two of them that is smaller than n, plus the tree over the rest: that
    of `comm.all_reduce_tree` over ranks. So where every rank adds an equal number of consecutive terms, a
    power of two, and the ranks' totals go through `all_reduce_tree`, the bits depend on the terms alone, not
    on how many ranks share them.
    """

    def __init__(self) -> None:
        self._levels: list[
            torch.Tensor
        ] = []  # level k: 2**k neighbouring terms, when bit k of the count is set
        self._num_terms = 0

    @property
    def num_terms(self) -> int:
        return self._num_terms

    @property
    def num_buffers(self) -> int:
        """Tensors that are kept; they are reused by the next sum."""
        return len(self._levels)

    @torch.no_grad()
    def add(self, term: torch.Tensor) -> None:
        """Takes the next term, which is not the last. Its values are gone afterwards."""
        level = self._carry(term)
        if level == len(self._levels):
            self._levels.append(torch.empty_like(term))
        self._levels[level].copy_(term)
        self._num_terms += 1

    @torch.no_grad()
    def finish(self, last: torch.Tensor) -> None:
        """Takes the last term and leaves the sum of all in it. The next `add` begins another sum."""
        level = self._carry(last)
        rest = self._num_terms >> level
        while rest:
            if rest & 1:
                torch.add(self._levels[level], last, out=last)
            rest, level = rest >> 1, level + 1
        self._num_terms = 0

    def cancel(self) -> None:
        """Forgets the terms of a sum that will not be finished."""
        self._num_terms = 0

    def _carry(self, term: torch.Tensor) -> int:
        level = 0
        while self._num_terms >> level & 1:
            torch.add(self._levels[level], term, out=term)
            level += 1
        return level
