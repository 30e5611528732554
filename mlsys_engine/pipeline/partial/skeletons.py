"""The outputs that a unit of another stage would have: computed once a form on fakes, then remembered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from mlsys_engine.pipeline.partial.absent import absent
from mlsys_engine.pipeline.partial.signatures import Form, signature_of
from mlsys_engine.trace.fakes import FakeMode
from mlsys_engine.trace.structure import map_tensors, tensors_of

#: What fakes raise where a shape or a branch depends on numbers.
NEEDS_DATA = (DynamicOutputShapeException, DataDependentOutputException)
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A unit's remembered outputs: what it returns, and by module what leaves it through hooks.

    Tensors in them are placeholders: `inputs` has those that are the unit's own inputs, by position.
    """

    returned: Any
    escaped: tuple[tuple[str, Any], ...]
    inputs: Mapping[int, int]

    def fresh(self, given: Sequence[torch.Tensor]) -> tuple[Any, list[tuple[str, Any]], list[torch.Tensor]]:
        """New absent values in the places of the outputs; the last item lists them once each."""
        made: dict[int, torch.Tensor] = {}

        def make(placeholder: torch.Tensor) -> torch.Tensor:
            position = self.inputs.get(id(placeholder))
            if position is not None:
                return given[position]
            if id(placeholder) not in made:
                made[id(placeholder)] = absent(Form.of(placeholder))
            return made[id(placeholder)]

        escaped = [(name, map_tensors(value, make)) for name, value in self.escaped]
        return map_tensors(self.returned, make), escaped, list(made.values())


class Skeletons:
    """Skeletons of one unit. `shapes` are full shapes of parameters that are held in part, by FQN."""

    def __init__(
        self,
        name: str,
        unit: nn.Module,
        escapes: Sequence[str],
        shapes: Shapes,
        device: Callable[[], torch.device],
    ) -> None:
        self._name, self._unit, self._shapes, self._device = name, unit, shapes, device
        self._escapes = [each for each in escapes if each.startswith(f"{name}.")]
        self._known: dict[Hashable, Outputs] = {}
        self._ghost: tuple[nn.Module, FakeTensorMode] | None = None
        self._caught: dict[str, Any] = {}

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
        """The outputs for arguments of this form, in this mode and under this autocast."""
        kind = self._device().type
        setting = (
            self._unit.training,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
        )
        key = (setting, signature_of(args), signature_of(kwargs))
        if key not in self._known:
            with torch._C.DisableTorchFunction():
                self._known[key] = self._compute(args, kwargs)
        return self._known[key]

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
        ghost, mode = self.built()
        fakes: dict[int, torch.Tensor] = {}
        given = tensors_of((args, kwargs))

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in fakes:
                made = FakeTensor(mode, Form.of(tensor).meta().detach(), self._device())
                fakes[id(tensor)] = made.requires_grad_(tensor.requires_grad)
            return fakes[id(tensor)]

        fake_args, fake_kwargs = map_tensors((args, kwargs), fake)
        before = {key: value._version for key, value in fakes.items()}
        self._caught.clear()
        for module, own in zip(ghost.modules(), self._unit.modules(), strict=True):
            module.training = own.training
        with mode:
            returned = ghost(*_copied(fake_args), **_copied(fake_kwargs))
        unchanged = {
            id(fakes[id(tensor)]): position
            for position, tensor in enumerate(given)
            if fakes[id(tensor)]._version == before[id(tensor)]
        }
        placeholders: dict[int, torch.Tensor] = {}
        inputs: dict[int, int] = {}

        def placeholder(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in placeholders:
                made = placeholders[id(tensor)] = Form.of(tensor).meta()
                if id(tensor) in unchanged:
                    inputs[id(made)] = unchanged[id(tensor)]
            return placeholders[id(tensor)]

        escaped = tuple((name, map_tensors(value, placeholder)) for name, value in self._caught.items())
        self._caught.clear()
        return Outputs(returned=map_tensors(returned, placeholder), escaped=escaped, inputs=inputs)

    def built(self) -> tuple[nn.Module, FakeTensorMode]:
        """A copy of the unit with fakes for its parameters and buffers, and without its hooks.

        First called while the unit still has the forward that is to be copied.
        """
        if self._ghost is not None:
            return self._ghost
        mode = FakeMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {}
        for name, tensor in (*self._unit.named_parameters(), *self._unit.named_buffers()):
            shape = self._shapes.get(f"{self._name}.{name}", tensor.shape)
            made = FakeTensor(
                mode, torch.empty(tuple(shape), dtype=tensor.dtype, device="meta"), self._device()
            )
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
        ghost = copy.deepcopy(self._unit, memo)
        for module in ghost.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                hooks.clear()
            module._forward_hooks_with_kwargs.clear()
            module._forward_pre_hooks_with_kwargs.clear()
            module._forward_hooks_always_called.clear()
        for name, module in ghost.named_modules():
            if name:
                guard(module, lambda: None)
        for escape in self._escapes:
            inner = ghost.get_submodule(escape[len(self._name) + 1 :])
            inner.register_forward_hook(
                lambda module, args, output, escape=escape: self._caught.__setitem__(escape, output)
            )
        self._ghost = ghost, mode
        return self._ghost


def guard(module: nn.Module, on_assumed: Callable[[], None]) -> None:
    """Where fakes cannot run this module because it needs data, its output is taken to be like its input."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except NEEDS_DATA:
            given = tensors_of((args, kwargs))
            if not given:
                raise
            on_assumed()
            made = torch.empty_like(given[0])
            learns = any(parameter.requires_grad for parameter in module.parameters())
            wanted = given[0].requires_grad or (learns and made.is_floating_point())
            return made.requires_grad_(wanted and torch.is_grad_enabled())

    module.__dict__["forward"] = forward


@contextmanager
def guarded(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Within it the modules are guarded; yields the names of those whose outputs were assumed."""
    assumed: list[str] = []
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    for name, module in modules.items():

        def note(name: str = name) -> None:
            if name not in assumed:
                assumed.append(name)

        guard(module, note)
    try:
        yield assumed
    finally:
        for name, module in modules.items():
            del module.__dict__["forward"]
            if before[name] is not None:
                module.__dict__["forward"] = before[name]


def _copied(value: Any) -> Any:
    """The same with copies of what is no tensor and may be filled meanwhile (a generation cache)."""
    tensors = {id(tensor): tensor for tensor in tensors_of(value)}
    return copy.deepcopy(value, tensors)
