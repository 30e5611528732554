"""What LAMB and LARS share: tensors that are scaled by their own norms, and those that are left out of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mlsys_engine.optim.base import Group, NativeOptimizer


class TensorRule(NativeOptimizer):
    """Base of rules whose step follows each tensor's norm.

    A group with `exclude=True` is neither decayed nor scaled, as the papers do with biases and the weights of
    norms. A group that does not say is divided in two: parameters of one dimension or none are excluded.
    """

    elementwise: ClassVar[bool] = False
    shardable: ClassVar[bool] = False
    steps_dtensors: ClassVar[bool] = True

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; one without `exclude` becomes two where it holds both kinds of parameters."""
        given = param_group.get("params") if isinstance(param_group, dict) else None
        if given is None or isinstance(given, set) or "exclude" in param_group:
            super().add_param_group(param_group)
            return
        items = [given] if isinstance(given, Tensor) else list(given)
        vectors = [item for item in items if _is_vector(item)]
        others = [item for item in items if not _is_vector(item)]
        for exclude, part in ((False, others), (True, vectors)):
            if part or (not exclude and not items):
                super().add_param_group({**param_group, "params": part, "exclude": exclude})


def _is_vector(item: Any) -> bool:
    parameter = item[1] if isinstance(item, tuple) else item
    return isinstance(parameter, Tensor) and parameter.ndim <= 1


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, summed in double, in float32; for devices without native kernels."""
    return [norm.float() for norm in torch._foreach_norm(tensors, 2, torch.float64)]


def ratio_or_one(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, and 1 where either is zero."""
    return torch.where((top == 0) | (bottom == 0), torch.ones_like(top), top / bottom)
