"""Writes down what modules put out during a forward, as two numbers for each whole output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mlsys_engine.tensor_parallel.runtime import CutTensor
from mlsys_engine.verify.gaps import waves

# Data shard, module FQN, which of its calls in one forward of the model, which tensor of what it returned.
Key = tuple[int, str, int, int]
Numbers = tuple[float, float]  # 2-norm, projection


def called(name: str, call: int) -> str:
    """How a module's call is told: one that is used again within a forward may be right the first time."""
    return name if call == 0 else f"{name} (call {call + 1})"


class OutputRecorder:
    """Hooks every module of a model that is about to be run, and takes its outputs in order of completion.

    Only ordinary tensors with values and those cut over ranks count: the skeleton of a value of another stage
    is passed over. What is computed again inside a backward is not written down either. The outputs of
    several microbatches are a list, in the order in which they were run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shard = 0
        self.order: list[str] = []  # calls of modules (`called`) by their completion
        self.outputs: dict[Key, list[Numbers]] = {}
        self._calls: dict[str, int] = {}  # of the present forward
        self._seen: set[str] = set()
        self._handles: list[Any] = [model.register_forward_pre_hook(self._begin)]
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._calls = {}

    def _hook(self, name: str) -> Any:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            values = list(output.values()) if isinstance(output, Mapping) else output
            for leaf, value in enumerate(map(_whole, tree_leaves(values))):
                if type(value) is not torch.Tensor or value.is_meta or not value.is_floating_point():
                    continue
                if called(name, call) not in self._seen:
                    self._seen.add(called(name, call))
                    self.order.append(called(name, call))
                self.outputs.setdefault((self.shard, name, call, leaf), []).append(_numbers(value))

        return take


@torch.no_grad()
def _whole(value: Any) -> Any:
    """What is cut over ranks is gathered: these run the same modules in the same order."""
    if not isinstance(value, CutTensor):
        return value
    with torch._C.DisableTorchFunction():  # a stage's forward does not see that its values are looked at
        return value.context.whole(value)


@torch.no_grad()
def _numbers(value: torch.Tensor) -> Numbers:
    flat = value.detach().to(torch.float64).flatten()
    return float(torch.linalg.vector_norm(flat)), float(flat @ waves(flat.numel(), flat.device))
