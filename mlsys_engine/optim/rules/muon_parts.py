"""The three steps inside a Muon step, each a native one over its own segment table.

Momentum writes what is to be orthogonalised into scratch matrices, stacked by shape; products of torch
replace them by their orthogonal factors; those are applied to the parameters. AdamW steps the other groups.
All of them work on the groups and on the state of the Muon that they are parts of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mlsys_engine.memory.flat_arena import FlatArena
from mlsys_engine.optim.base import Group, NativeOptimizer
from mlsys_engine.optim.checks import check_gradient
from mlsys_engine.optim.rules.adamw import AdamW
from mlsys_engine.optim.rules.orthogonal import newton_schulz, shape_ratio

if TYPE_CHECKING:
    from mlsys_engine.optim.rules.muon import Muon

BATCH_BYTES = 32 * 2**20  # of matrices that are multiplied together: more would only cost memory


class _Part(NativeOptimizer):
    """A rule over tensors that the owner chooses; a group's own hyper-parameters are those of
    `group["of"]`."""

    counts_steps: ClassVar[bool] = False
    _announced = True  # the owner does it

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {})

    def check_group(self, group: Group) -> None:
        """The owner has."""


class MomentumPart(_Part):
    """Its parameters are the scratch matrices."""

    rule: ClassVar[str] = "muon_momentum"

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        of = group["of"]
        return of["momentum"], 1.0 if of["nesterov"] else 0.0, -1.0 if of["maximize"] else 1.0

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        of = group["of"]
        grads = list(torch._foreach_neg(grads)) if of["maximize"] else grads
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in params]
        torch._foreach_lerp_(buffers, grads, 1 - of["momentum"])
        torch._foreach_copy_(params, buffers)
        if of["nesterov"]:
            torch._foreach_lerp_(params, grads, 1 - of["momentum"])


class ApplyPart(_Part):
    """Its parameters are the model's; their "gradients" are the orthogonal matrices."""

    rule: ClassVar[str] = "muon_apply"

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return ()

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        return group["of"]["lr"], group["ratio"], group["of"]["weight_decay"]

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        rate, ratio, decay = self.hyper_row(group)
        torch._foreach_mul_(params, 1 - rate * decay)
        torch._foreach_sub_(params, list(torch._foreach_mul(grads, rate * ratio)))


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """The matrices of one shape of one group on one device."""

    group: Group
    params: list[Tensor]
    scratch: Tensor  # [matrices, rows, cols]
    views: Sequence[Tensor]  # of scratch, shaped like the parameters

    @classmethod
    def of(cls, group: Group, params: list[Tensor]) -> _Stack:
        first = params[0]
        shape = len(params), first.shape[0], first.numel() // first.shape[0]
        scratch = torch.zeros(shape, dtype=torch.float32, device=first.device)
        views = [
            torch.nn.Parameter(matrix.view(parameter.shape), requires_grad=False)
            for matrix, parameter in zip(scratch.unbind(), params, strict=True)
        ]
        return cls(group=group, params=params, scratch=scratch, views=views)

    def orthogonalise(self, present: Sequence[bool]) -> None:
        """Replaces the matrices with a gradient by their orthogonal factors, in batches."""
        group, scratch = self.group, self.scratch
        dtype = group["ns_dtype"] or (torch.bfloat16 if scratch.is_cuda else torch.float32)
        chosen = [index for index, has_gradient in enumerate(present) if has_gradient]
        size = max(1, BATCH_BYTES // (scratch[0].numel() * scratch.element_size()))
        for first in range(0, len(chosen), size):
            batch = chosen[first : first + size]
            whole = batch[-1] - batch[0] + 1 == len(batch)
            index = slice(batch[0], batch[-1] + 1) if whole else torch.tensor(batch, device=scratch.device)
            scratch[index] = newton_schulz(
                scratch[index], group["ns_coefficients"], group["eps"], group["ns_steps"], dtype
            ).to(scratch.dtype)


class MuonParts:
    """Everything about a Muon step that stays the same until its groups or its state object change."""

    def __init__(self, owner: Muon) -> None:
        self._owner = owner
        self._owner_state, self._groups = owner.state, list(owner.param_groups)
        self._params = [list(group["params"]) for group in owner.param_groups]
        self._flags = [group["use_muon"] for group in owner.param_groups]
        self._stacks = [
            _Stack.of(group, members)
            for group in owner.param_groups
            if group["use_muon"]
            for members in _by_shape(group["params"])
        ]
        self._matrices = [parameter for stack in self._stacks for parameter in stack.params]
        self._views = [view for stack in self._stacks for view in stack.views]
        self._momentum = self._apply = self._rest = None
        if self._stacks:
            self._momentum = MomentumPart([
                {"params": stack.views, "of": stack.group} for stack in self._stacks
            ])  # fmt: skip
            self._apply = ApplyPart([_group_of_apply(stack) for stack in self._stacks])
            self._apply.state = owner.state  # for the bits that narrow parameters have no room for
        rest = [group for group in owner.param_groups if not group["use_muon"] and group["params"]]
        if rest:
            self._rest = _sharing(rest, owner)

    def is_current(self, owner: Muon) -> bool:
        """Whether the owner has the same groups with the same parameters, and the same state object."""
        return (
            owner.state is self._owner_state
            and len(owner.param_groups) == len(self._groups)
            and all(
                group is known and group["use_muon"] == flag and _same(group["params"], params)
                for group, known, flag, params in zip(
                    owner.param_groups, self._groups, self._flags, self._params, strict=True
                )
            )
        )

    def adopt(self, params: FlatArena, grads: FlatArena) -> None:
        if self._rest is not None:
            self._rest.adopt(params, grads)

    def step(
        self, grads: list[Tensor | None], grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool
    ) -> None:
        """Steps matrices, then the rest. `grads` are in the order of the owner's parameters."""
        gradient_of = dict(zip((p for params in self._params for p in params), grads, strict=True))
        for parameter, gradient in gradient_of.items():
            if gradient is not None and (
                gradient.layout is not torch.strided or gradient.dtype is not parameter.dtype
            ):
                check_gradient(gradient, parameter, self._owner.name_of(parameter))
        matrices = [gradient_of[parameter] for parameter in self._matrices]
        if self._momentum is not None and self._apply is not None and any(g is not None for g in matrices):
            self._share_momenta(self._momentum, matrices)
            self._momentum.step_on(matrices, grad_scale, skip, zero_grad)
            self._keep_momenta(self._momentum)
            present = iter([gradient is not None for gradient in matrices])
            for stack in self._stacks:
                stack.orthogonalise([next(present) for _ in stack.views])
            updates = [
                None if gradient is None else view
                for view, gradient in zip(self._views, matrices, strict=True)
            ]
            self._apply.step_on(updates, 1.0, skip)
        if self._rest is not None:
            rest = [gradient_of[parameter] for parameter in self._rest._parameters()]
            self._rest.step_on(rest, grad_scale, skip, zero_grad)

    def _share_momenta(self, momentum: MomentumPart, matrices: Sequence[Tensor | None]) -> None:
        """Gives each scratch matrix the momentum alone: what else the state holds is the parameter's form."""
        for view, parameter, gradient in zip(self._views, self._matrices, matrices, strict=True):
            if gradient is None:
                continue
            held, own = self._owner_state[parameter].get("momentum_buffer"), momentum.state[view]
            if held is None:
                own.pop("momentum_buffer", None)
            elif own.get("momentum_buffer") is not held:
                own["momentum_buffer"] = held

    def _keep_momenta(self, momentum: MomentumPart) -> None:
        """Takes over the momenta that the step has made or laid out anew."""
        for view, parameter in zip(self._views, self._matrices, strict=True):
            own = momentum.state.get(view)
            if own and "momentum_buffer" in own:
                self._owner_state[parameter]["momentum_buffer"] = own["momentum_buffer"]


def _sharing(groups: list[Group], owner: Muon) -> AdamW:
    """An AdamW over the owner's own groups and state."""
    inner = AdamW([dict(group) for group in groups])
    for group in groups:
        for key, value in inner.defaults.items():
            group.setdefault(key, value)
    inner.param_groups, inner.state = groups, owner.state
    inner._announced = True
    return inner


def _group_of_apply(stack: _Stack) -> Group:
    _, rows, cols = stack.scratch.shape
    precision = {key: stack.group[key] for key in ("master", "ema", "seed")}
    ratio = shape_ratio(rows, cols, stack.group["adjust_lr_fn"])
    return {"params": stack.params, "of": stack.group, "ratio": ratio, **precision}


def _by_shape(params: Sequence[Tensor]) -> list[list[Tensor]]:
    found: dict[Any, list[Tensor]] = {}
    for parameter in params:
        found.setdefault((parameter.shape, parameter.device), []).append(parameter)
    return list(found.values())


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
