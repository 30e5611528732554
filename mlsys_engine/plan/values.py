"""The parts of a Plan: small frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mlsys_engine.errors import ConfigError

# Names, not torch objects: a Plan is read by people and by programs that have no torch.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


@dataclass(frozen=True, kw_only=True)
class MeshAxis:
    """One axis of the mesh of ranks; the last axis varies fastest with the rank."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if not self.name or self.size < 1:
            raise ConfigError(
                f"A mesh axis named {self.name!r} of size {self.size}.",
                "An axis has a name and at least one rank.",
                "Give sizes of 1 or more.",
            )


@dataclass(frozen=True, kw_only=True)
class BucketSlot:
    """One parameter's place in a bucket; places follow each other in the order of the bucket."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Parameters whose gradients are reduced by one collective. Buckets are launched in their own order."""

    dtype: str
    slots: tuple[BucketSlot, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or not self.slots:
            raise ConfigError(
                f"A bucket of dtype {self.dtype!r} with {len(self.slots)} parameters.",
                f"A bucket has at least one parameter and one dtype of {', '.join(DTYPES)}.",
                "Make the plan with mls.plan.",
            )

    @property
    def numel(self) -> int:
        return sum(slot.numel for slot in self.slots)

    @property
    def num_bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize
