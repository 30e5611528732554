"""In which forms an optimizer stores parameters' lost bits and moments, and how kernels are told.

A group's `master` and `moments` say what is wanted; `form_of` says what that means for one parameter. The
numbers are those of csrc/optim/segment.h.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypedDict

import torch
from torch import Tensor

from mlsys_engine.errors import ConfigError, did_you_mean

MASTERS = ("auto", "split", "fp32", None)
MOMENTS = ("fp32", "bf16", "int8")
CODE_BLOCK = 64  # elements that share a scale: csrc/optim/codes.h


class Stored(IntEnum):
    """How the elements of an array are stored."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    SIGNED8 = 3
    UNSIGNED8 = 4


class Master(IntEnum):
    """Where a narrow parameter keeps the bits that it has no room for."""

    NONE = 0
    SPLIT = 1
    FLOAT32 = 2


class Precision(TypedDict, total=False):
    """Keywords that all native optimizers share.

    master: what keeps the bits that a bf16 or fp16 parameter has no room for. "split": 16 more bits beside a
        bf16 parameter, lossless; "fp32": a whole copy; None: nothing, new values are rounded stochastically;
        "auto": "split" for bf16, "fp32" for fp16. float32 parameters need none.
    moments: "fp32"; "bf16", rounded stochastically; "int8", 8-bit codes with a scale for 64 neighbours.
    ema: decay of a moving average of the weights, updated in the same pass; None: no average.
    seed: of stochastic rounding, beside the parameter's name, the step and the element.
    """

    master: str | None
    moments: str
    ema: float | None
    seed: int


PRECISION = Precision(master="auto", moments="fp32", ema=None, seed=0)

STORED = {
    torch.float32: Stored.FLOAT32,
    torch.bfloat16: Stored.BFLOAT16,
    torch.float16: Stored.FLOAT16,
}
DTYPE_OF = {
    Stored.FLOAT32: torch.float32,
    Stored.BFLOAT16: torch.bfloat16,
    Stored.FLOAT16: torch.float16,
    Stored.SIGNED8: torch.uint8,
    Stored.UNSIGNED8: torch.uint8,
}
# The keys of state[p] that hold a parameter's lost bits; "master" is also what state_dict() has for both.
MASTER_KEY = {Master.SPLIT: "remainder", Master.FLOAT32: "master"}
EMA_KEY = "ema"
SCALE_SUFFIX = "_scale"
# Keys of state[p], beside the moments, whose values are laid out like the parameter.
LIKE_PARAMETER = ("remainder", "master", EMA_KEY)
# Bits of a segment's Format, beside those of Form.code: the form of its gradient, and whether to zero it.
GRAD_SHIFT, ZERO_GRAD = 4, 1 << 24


@dataclass(frozen=True)
class Form:
    """How one parameter and its state are stored."""

    param: Stored
    master: Master
    states: tuple[Stored, ...]
    has_ema: bool

    @property
    def code(self) -> int:
        """A Format of csrc/optim/segment.h, for gradients in float32 that are kept."""
        code = int(self.param) | int(self.master) << 8
        for index, state in enumerate(self.states):
            code |= int(state) << (12 + 4 * index)
        return code

    @property
    def is_plain(self) -> bool:
        """Whether everything is float32 and nothing lies beside the rule's own arrays."""
        return self.code == 0 and not self.has_ema

    @property
    def is_random(self) -> bool:
        """Whether something is rounded by chance, so that results depend on the step count."""
        narrow = self.param is not Stored.FLOAT32 and self.master is Master.NONE
        return narrow or any(state is not Stored.FLOAT32 for state in self.states)


def check_precision(group: dict[str, Any]) -> None:
    """Raises ConfigError for what is no precision."""
    for name, allowed in (("master", MASTERS), ("moments", MOMENTS)):
        if group[name] not in allowed:
            raise ConfigError(
                f"{name}={group[name]!r} was given.",
                f"One of {', '.join(map(repr, allowed))} is expected.",
                did_you_mean(str(group[name]), [str(choice) for choice in allowed]),
            )
    ema = group["ema"]
    if ema is not None and not (isinstance(ema, int | float) and 0.0 <= ema < 1.0):
        raise ConfigError(
            f"ema={ema!r} was given.",
            "The decay of a moving average is at least 0 and below 1, or None for no average.",
            "Choose ema=0.999, or leave it out.",
        )
    if not isinstance(group["seed"], int):
        raise ConfigError(
            f"seed={group['seed']!r} was given.", "A whole number is expected.", "Leave it out for 0."
        )


def form_of(parameter: Tensor, group: dict[str, Any], kinds: tuple[str, ...]) -> Form:
    """How this parameter is stored; `kinds`: "signed", "unsigned" or "exact" (float32) for each moment."""
    stored = STORED[parameter.dtype]
    master = Master.NONE
    if stored is not Stored.FLOAT32 and group["master"] is not None:
        if stored is Stored.FLOAT16 and group["master"] == "split":
            raise ConfigError(
                'master="split" was given for a float16 parameter.',
                "Only bf16 has the exponent of float32, so that 16 more bits make up the whole.",
                'Choose master="fp32" or "auto", or keep the model in bf16.',
            )
        split = group["master"] == "split" or (group["master"] == "auto" and stored is Stored.BFLOAT16)
        master = Master.SPLIT if split else Master.FLOAT32
    return Form(
        param=stored,
        master=master,
        states=tuple(_stored_moment(group["moments"], kind) for kind in kinds),
        has_ema=group["ema"] is not None,
    )


def random_key(name: str, seed: int) -> int:
    """What a parameter's random numbers depend on: its name and the seed. A signed 64-bit number."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _stored_moment(moments: str, kind: str) -> Stored:
    if moments == "fp32" or kind == "exact":
        return Stored.FLOAT32
    if moments == "bf16":
        return Stored.BFLOAT16
    return Stored.SIGNED8 if kind == "signed" else Stored.UNSIGNED8
