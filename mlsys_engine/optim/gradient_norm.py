"""The norm of gradients that come and go one at a time, in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlsys_engine.optim.distributed import ShardLayout, global_sum, layout_of, local_gradient
from mlsys_engine.optim.norms import sum_of_terms, terms_of


class GradientNorm:
    """Keeps the terms of each gradient's sum of squares: 8 bytes for every 4096 elements.

    The sum has the bits that `NativeOptimizer.sum_of_squares` gives for all gradients at once.
    """

    def __init__(self, name_of: Callable[[Tensor], str]) -> None:
        self._name_of = name_of
        self._terms: dict[Tensor, Tensor] = {}

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Takes the terms of a parameter's finished gradient, which may be freed afterwards."""
        self._terms[parameter] = terms_of(local_gradient(parameter, gradient, self._name_of))

    def of(self, parameter: Tensor) -> Tensor:
        """The sum of squares of one gradient that was added, over all its shards; 0-d float64."""
        layout, own = layout_of(parameter), sum_of_terms(self._terms[parameter])
        return own if layout is None else global_sum({layout: own})

    def sum_of_squares(self, params: Sequence[Tensor]) -> Tensor:
        """The sum over all gradients in the order of `params`, the same on all ranks; 0-d float64."""
        members: dict[ShardLayout | None, list[Tensor]] = {}
        for parameter in params:
            own = members.setdefault(layout_of(parameter), [])
            if parameter in self._terms:
                own.append(self._terms[parameter])
        return global_sum({layout: _sum(terms) for layout, terms in members.items()})


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """Terms on several devices are added on each, then on the first one's, as in norms.sum_of_squares."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in terms:
        by_device.setdefault(tensor.device, []).append(tensor)
    sums = [sum_of_terms(torch.cat(members)) for members in by_device.values()]
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    total = sums[0]
    for other in sums[1:]:
        total = total + other.to(total.device)
    return total
