"""Follows cuts of weights through one forward, operator by operator.

The mode sees what the model's Python has become: some fifty kinds of operators, whoever wrote the model. A
weight that multiplies a whole value begins a cut along its outputs (column); one that multiplies a value cut
along the summed dim is cut there, too (row), and the cut ends in its sum. An operator without a rule wants
whole values: the cut fails, and says where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mlsys_engine.tensor_parallel.cuts import Cut, Factor, Layout, Place, common_factors, cuts_of, plain

Refs = tuple[Place | None, ...]


@dataclass(kw_only=True)
class Choices:
    """What earlier passes have found out."""

    whole: dict[str, str] = field(default_factory=dict)  # parameter FQN -> why it is not cut
    sliced: dict[str, str] = field(default_factory=dict)  # row weights that take their slice of a whole input
    segments: dict[Place, tuple[int, ...]] = field(default_factory=dict)
    by_experts: bool = (
        False  # whether all stacks of experts are cut into experts, or each expert by its width
    )
    stacks: set[str] = field(default_factory=set)  # FQNs of stacks that are cut into experts in any case


class Flow(TorchDispatchMode):
    """One pass. `names` are the FQNs of the parameters that stand in the model now."""

    def __init__(
        self,
        names: Mapping[torch.Tensor, str],
        sample: list[torch.Tensor],
        size: int,
        choices: Choices,
        rules: Mapping[str, Callable[..., list[Layout | None] | None]],
    ) -> None:
        super().__init__()
        self.size, self.choices, self._rules = size, choices, rules
        self.cuts: list[Cut] = []
        self.uses: dict[str, str] = {}  # parameter FQN -> "projection" or "embedding", as it is used
        self.stacks: set[str] = set()  # FQNs of stacks that may be cut into experts
        self.module = ""
        self._layouts: Any = WeakIdKeyDictionary()
        self._refs: Any = WeakIdKeyDictionary()
        self._from_sample: Any = WeakIdKeyDictionary()
        self._decided: dict[str, tuple[Place, Cut] | None] = {}
        for tensor in sample:
            self._from_sample[tensor] = True
        for tensor, name in names.items():
            self._refs[tensor] = tuple((name, dim) for dim in range(tensor.ndim))

    def layout(self, tensor: torch.Tensor) -> Layout:
        return self._layouts.get(tensor) or plain(tensor.shape)

    def refs(self, tensor: Any) -> Refs | None:
        """Which dims of which parameter the dims of a value are; None for what is no view of a parameter."""
        return self._refs.get(tensor) if isinstance(tensor, torch.Tensor) else None

    def set_refs(self, tensor: torch.Tensor, refs: Refs) -> None:
        self._refs[tensor] = refs

    def comes_from_sample(self, tensor: torch.Tensor) -> bool:
        return tensor in self._from_sample

    def fail(self, layouts: Any, why: str) -> None:
        """The cuts of these layouts end here."""
        for layout in layouts:
            for cut in cuts_of(layout):
                cut.fail(f"{why} in {self.module or 'the model itself'}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if any(tensor in self._from_sample for tensor in inputs):
            for tensor in outputs:
                self._from_sample[tensor] = True
        name = func.overloadpacket.__name__
        rule = self._rules.get(name) or self._rules.get(name.rstrip("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self._rules["pointwise"]
        if rule is not None:
            self._keep(name, outputs, rule(self, args, kwargs, outputs))
        elif outputs or name == "_local_scalar_dense":  # others ask for a device or a shape
            self.fail([self.layout(tensor) for tensor in inputs], f"{name} has no rule")
        return output

    def _keep(self, name: str, outputs: list[torch.Tensor], results: list[Layout | None] | None) -> None:
        for tensor, layout in zip(outputs, results or (), strict=False):
            if layout is None:
                continue
            cuts = [factor for dim in layout for factor in dim if factor.cut is not None]
            if len(cuts) > 1:
                self.fail([layout], f"{name} of values that are cut along two dims")
            elif len(cuts) == 1:
                self._layouts[tensor] = layout
            elif tensor in self._layouts:
                del self._layouts[tensor]

    def joined(self, shape: tuple[int, ...], layouts: list[Layout], name: str) -> Layout | None:
        """The layout of an elementwise result: the cuts of what is broadcast together become one."""
        if not any(cuts_of(layout) for layout in layouts):
            return None
        result = []
        for position in range(-len(shape), 0):
            dims = [layout[position] for layout in layouts if len(layout) >= -position and layout[position]]
            factors = common_factors(dims, self.size) if dims else []
            if isinstance(factors, str):
                self.fail(layouts, f"{name}: {factors}")
                return None
            result.append(tuple(self._one(list(same)) for same in zip(*factors, strict=True)))
        return tuple(result)

    def _one(self, factors: list[Factor]) -> Factor:
        cut = [factor for factor in factors if factor.cut is not None]
        for other in cut[1:]:
            assert cut[0].cut is not None and other.cut is not None
            cut[0].cut.join(other.cut)
            if other.segments != cut[0].segments:
                cut[0].cut.fail(f"values of different segments meet in {self.module}")
        return cut[0] if cut else factors[0]

    def contracted(self, factors: tuple[Factor, ...], inner: Place | None, outer: Place | None) -> Cut | None:
        """Decides about a weight that multiplies a value whose summed dim has these factors.

        `inner` and `outer` are the weight's dims that are summed and kept. Returns the cut of the result's
        last dim, if it has one.
        """
        name = (inner or outer or ("", 0))[0]
        self.uses.setdefault(name, "projection")
        found = next((index for index, factor in enumerate(factors) if factor.cut is not None), None)
        cut = None if found is None else factors[found].cut
        if name in self._decided:
            return self._again(name, cut, inner, outer)
        if name in self.choices.whole:
            self._decided[name] = None
            if cut is not None:
                cut.fail(f"{name} is whole: {self.choices.whole[name]}")
            return None
        place = inner if cut is not None or name in self.choices.sliced else outer
        if place is None:
            if cut is not None:
                cut.fail(f"a part of {name} is summed over a cut dim in {self.module}")
            return None
        if cut is not None and found is not None:
            cut.root().places[place] = _segments(factors, found)
            self._decided[name] = (place, cut)
            return None
        fresh = Cut(places={place: self.choices.segments.get(place, ())})
        self.cuts.append(fresh)
        self._decided[name] = (place, fresh)
        if name in self.choices.sliced:
            return None
        fresh.columns.append(place)
        return fresh

    def table(self, name: str, ids: torch.Tensor) -> None:
        """Decides about an embedding's table: cut by rows when its ids come from the batch."""
        from_sample = self.comes_from_sample(ids)
        self.uses.setdefault(name, "embedding" if from_sample else "position")
        if name in self._decided or name in self.choices.whole:
            return
        if not from_sample:
            self._decided[name] = None
            self.choices.whole[name] = "its ids do not come from the batch: a table of positions"
            return
        place = (name, 0)
        fresh = Cut(places={place: ()})
        self.cuts.append(fresh)
        self._decided[name] = (place, fresh)

    def experts(self, place: Place) -> bool:
        """Decides about a stack of experts' weights: whether every rank has some of them."""
        name = place[0]
        self.stacks.add(name)
        if not self.choices.by_experts and name not in self.choices.stacks:
            return False
        self.uses.setdefault(name, "projection")
        if name not in self._decided and name not in self.choices.whole:
            cut = Cut(places={place: ()})
            self.cuts.append(cut)
            self._decided[name] = (place, cut)
        return True

    def _again(self, name: str, cut: Cut | None, inner: Place | None, outer: Place | None) -> Cut | None:
        """A weight that is used once more, or tied: it stays as it was cut first."""
        decided = self._decided[name]
        if decided is None:
            if cut is not None:
                cut.fail(f"{name} is whole")
            return None
        place, first = decided
        if place == outer:
            if cut is not None:
                cut.fail(f"{name} is cut along its outputs already")
            if place not in first.columns:
                first.columns.append(place)
            return first
        if place == inner and cut is not None:
            first.join(cut)
        return None


def _segments(factors: tuple[Factor, ...], index: int) -> tuple[int, ...]:
    """The segments of a dim whose factor `index` is cut: what is outside repeats them."""
    before = after = 1
    for position, factor in enumerate(factors):
        if position < index:
            before *= factor.length
        elif position > index:
            after *= factor.length
    own = factors[index].segments or (factors[index].length,)
    lengths = tuple(length * after for length in own) * before
    return lengths if len(lengths) > 1 else ()
