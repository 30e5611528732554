"""Writes down what modules put out during a forward, as two numbers for each whole output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mlsys_engine.verify.gaps import waves

Key = tuple[int, str, int]  # data shard, module FQN, which of its outputs
Numbers = tuple[float, float]  # 2-norm, projection


class OutputRecorder:
    """Hooks every module of a model that is about to be run, and takes its outputs in order of completion.

    Only ordinary tensors with values count: the skeleton of a value of another stage is passed over. What
    runs outside the model's own forward, a block that is computed again in backward for one, is not written
    down either.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shard = 0
        self.order: list[str] = []  # modules by their first completion
        self.outputs: dict[Key, Numbers] = {}
        self._counts: dict[tuple[int, str], int] = {}
        self._seen: set[str] = set()
        self._depth = 0
        self._handles: list[Any] = [model.register_forward_pre_hook(self._enter)]
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        self._handles.append(model.register_forward_hook(self._leave, always_call=True))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._depth -= 1

    def _hook(self, name: str) -> Any:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._depth == 0:
                return
            values = list(output.values()) if isinstance(output, Mapping) else output
            for value in tree_leaves(values):
                if type(value) is not torch.Tensor or value.is_meta or not value.is_floating_point():
                    continue
                if name not in self._seen:
                    self._seen.add(name)
                    self.order.append(name)
                count = self._counts.get((self.shard, name), 0)
                self._counts[self.shard, name] = count + 1
                self.outputs[self.shard, name, count] = _numbers(value)

        return take


@torch.no_grad()
def _numbers(value: torch.Tensor) -> Numbers:
    flat = value.detach().to(torch.float64).flatten()
    return float(torch.linalg.vector_norm(flat)), float(flat @ waves(flat.numel(), flat.device))
