"""A model's parameters and gradients in flat memory, laid out as the plan's buckets say.

One pair of arenas for each dtype of gradients, both of the same layout; a bucket is a contiguous range of
them. Parameters become views (the Parameter objects stay what they are), so that a collective or an optimizer
segment covers a whole bucket, and neither copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import Allocate, FlatArena, layout_slots
from mlsys_engine.plan import DTYPES, Bucket


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one parameter lives."""

    name: str
    parameter: nn.Parameter
    data: torch.Tensor  # the parameter's view of the arena
    gradient: torch.Tensor  # its gradient's view of the arena; `.grad` is this very object once it is ready
    index: int  # among all parameters, in the order of the buckets
    bucket: int


@dataclass(frozen=True, kw_only=True)
class BucketMemory:
    """One bucket's range of the arenas."""

    index: int  # among all buckets
    parameters: torch.Tensor  # 1-d, the range with its padding
    gradients: torch.Tensor
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True)
class ArenaPair:
    """Parameters, and gradients of one dtype; `slot.name` is the parameter's name."""

    parameters: FlatArena
    gradients: FlatArena


class ModelArenas:
    """All arenas of a model. Building it moves trainable parameters in; `release` moves them out again."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        parameters: Mapping[str, nn.Parameter],
        allocate_gradients: Allocate | None = None,
        allocate_parameters: Allocate | None = None,
        stored: torch.dtype | None = None,
    ) -> None:
        """`stored` is the type that all parameters are cast to; None: that of their bucket's gradients."""
        self.pairs: dict[str, ArenaPair] = {}
        memories: dict[int, BucketMemory] = {}
        for dtype in dict.fromkeys(bucket.dtype for bucket in buckets):
            mine = {index: bucket for index, bucket in enumerate(buckets) if bucket.dtype == dtype}
            self.pairs[dtype] = _build_pair(
                tuple(mine.values()), parameters, allocate_gradients, allocate_parameters, stored
            )
            memories |= zip(mine, _split(buckets, mine, self.pairs[dtype], parameters), strict=True)
        self.buckets = tuple(memories[index] for index in range(len(buckets)))
        self.places = tuple(place for bucket in self.buckets for place in bucket.places)
        with torch.no_grad():
            for place in self.places:
                place.data.copy_(place.parameter)
                place.parameter.grad = None
                place.parameter.data = place.data
                if place.gradient.dtype != place.data.dtype:
                    # Autograd then casts what it has for the parameter and adds it up in this type.
                    place.parameter.grad_dtype = place.gradient.dtype

    def check_in_place(self) -> None:
        """Raises ConfigError when somebody moved a parameter out of its arena since the last step."""
        for place in self.places:
            if place.parameter.data_ptr() != place.data.data_ptr():
                raise ConfigError(
                    f"Parameter {place.name} was given other memory after apply.",
                    "Parameters of a converted model stay views of the arena that the optimizer steps.",
                    "Write into it (`parameter.data.copy_(...)`), or change the model before mls.apply.",
                )

    def release(self) -> None:
        """Gives every parameter memory of its own again, and drops the gradients."""
        for place in self.places:
            place.parameter.grad = None
            place.parameter.grad_dtype = place.data.dtype
            place.parameter.data = place.data.clone()


def _build_pair(
    buckets: Sequence[Bucket],
    parameters: Mapping[str, nn.Parameter],
    allocate_gradients: Allocate | None,
    allocate_parameters: Allocate | None,
    stored: torch.dtype | None,
) -> ArenaPair:
    dtype = DTYPES[buckets[0].dtype]
    stored = stored or dtype
    # Of the narrower type, so that every slot is aligned in both arenas.
    aligned = min(stored, dtype, key=lambda kind: kind.itemsize)
    slots = layout_slots([(slot.name, slot.shape) for bucket in buckets for slot in bucket.slots], aligned)
    device = parameters[slots[0].name].device
    return ArenaPair(
        parameters=FlatArena.build(slots, stored, allocate_parameters, device=device),
        gradients=FlatArena.build(slots, dtype, allocate_gradients, device=device),
    )


def _split(
    buckets: Sequence[Bucket],
    mine: Mapping[int, Bucket],
    pair: ArenaPair,
    parameters: Mapping[str, nn.Parameter],
) -> Iterator[BucketMemory]:
    """The buckets `mine` (by index among all `buckets`) as ranges of the arenas of their dtype."""
    first_index = list(accumulate((len(bucket.slots) for bucket in buckets), initial=0))
    slots = pair.parameters.slots
    position = 0
    for index, bucket in mine.items():
        end = position + len(bucket.slots)
        places = tuple(
            Place(
                name=slot.name,
                parameter=parameters[slot.name],
                data=pair.parameters.view(slot),
                gradient=pair.gradients.view(slot),
                index=first_index[index] + offset,
                bucket=index,
            )
            for offset, slot in enumerate(slots[position:end])
        )
        # A bucket ends where the next one starts, so every range starts on the arena's alignment.
        begin = slots[position].offset
        stop = slots[end].offset if end < len(slots) else pair.parameters.data.numel()
        yield BucketMemory(
            index=index,
            parameters=pair.parameters.data[begin:stop],
            gradients=pair.gradients.data[begin:stop],
            places=places,
        )
        position = end
