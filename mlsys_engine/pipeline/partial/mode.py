"""Follows every value of a forward between the units: which stage has it, and what crosses to which.

A result has the latest stage of its arguments; values of no stage are computed by everyone. The walk is
the same on every rank, so the ranks agree on what crosses and in which order without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

from mlsys_engine.pipeline.partial.absent import METADATA, Absent, absent, as_absent, skeleton, usable
from mlsys_engine.pipeline.partial.refusals import PartialForwardError, refusal
from mlsys_engine.pipeline.partial.signatures import Form
from mlsys_engine.pipeline.partial.skeletons import Skeletons
from mlsys_engine.trace.structure import map_tensors, tensors_of

_NOWHERE = -1  # the stage of a value that everyone computes
_TAG = "_mls_stage"
_DEVICE = torch.Tensor.device.__get__
_PLACES = {getattr(torch.Tensor, name).__get__: name for name in ("is_meta", "is_cpu", "is_cuda")}
_READS = frozenset(
    (
        "__bool__",
        "item",
        "tolist",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "numpy",
        "__array__",
        "__contains__",
        "is_nonzero",
        "equal",
        "allclose",
        "data_ptr",
    )
)
_RANDOM = frozenset(
    (
        "rand",
        "randn",
        "randint",
        "randperm",
        "rand_like",
        "randn_like",
        "randint_like",
        "bernoulli",
        "bernoulli_",
        "normal",
        "normal_",
        "uniform_",
        "random_",
        "exponential_",
        "multinomial",
        "poisson",
        "dropout",
        "dropout_",
        "alpha_dropout",
        "feature_dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "rrelu",
        "gumbel_softmax",
    )
)
_STAYS = frozenset(("cpu", "cuda"))
Homes = Mapping[int, tuple[tuple[int, ...], tuple[int, ...] | None]]


class Left(BaseException):
    """Ends a forward when the stage has nothing more to do in it; no Exception, which a model may catch."""


class StageMode(TorchFunctionMode):
    """One run of one stage. `ends` are the known counts (received, sent, own unit calls) to leave after."""

    def __init__(
        self,
        *,
        stage: int,
        last: int,
        device: torch.device,
        homes: Homes,
        receive: Callable[[torch.Tensor], torch.Tensor],
        ends: tuple[int, int, int] | None,
        leaving: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.sent: list[torch.Tensor] = []
        self.received: list[torch.Tensor] = []
        self.unit_calls = 0
        self._stage, self._last, self._device, self._homes = stage, last, device, homes
        self._receive, self._ends = receive, ends
        # Makes whole what is cut over other ranks, before it may cross.
        self._leaving = leaving if leaving is not None and stage != last else _as_it_is
        self._token = object()  # of this run: tags of others do not count
        self._position = 0  # the latest stage whose unit has been called: there random numbers are drawn
        self._came: dict[int, torch.Tensor] = {}  # absent value -> what was received for it
        self._relayed: set[int] = set()
        self._forms: dict[int, torch.Tensor] = {}  # a value that a later stage wrote in place -> its skeleton
        self._written: dict[
            int, torch.Tensor
        ] = {}  # an absent value that this stage wrote in place -> the result
        self._kept: list[torch.Tensor] = []  # so that ids stay what they are
        self._versions: list[int] = []

    # What crosses.

    def stage_of(self, tensor: torch.Tensor) -> int:
        """The stage that computes this value, or -1 for a value that everyone has."""
        tag = tensor.__dict__.get(_TAG)
        if tag is not None and tag[0] is self._token:
            stage: int = tag[1]
            return stage
        if isinstance(tensor, Absent):
            raise refusal(
                "a value that another stage computed in an earlier forward is read.",
                "What a stage keeps from one forward to the next is known to that stage alone.",
                "Keep it inside one block, or pass it with the batch.",
            )
        if tensor.grad_fn is not None and id(tensor) not in self._homes:
            raise refusal(
                f"a tensor of shape {tuple(tensor.shape)} was computed inside a block and left it "
                f"unseen, by an "
                "attribute, a list or a hook.",
                "Other stages follow what blocks return and what the plan's trace saw.",
                "Let the block return it, or make the plan again with the hooks in place.",
            )
        return _NOWHERE

    def tag(self, tensor: torch.Tensor, stage: int) -> None:
        tensor.__dict__[_TAG] = (self._token, stage)

    def tag_own(self, value: Any) -> Any:
        """Values of this stage that left a unit, as they may cross."""
        value = self._leaving(value)
        for tensor in tensors_of(value):
            if id(tensor) not in self._homes:
                self.tag(tensor, self._stage)
        return value

    def _home(self, tensor: torch.Tensor, stage: int) -> int:
        """Of a parameter: nowhere if the reading stage has it, else its first stage."""
        used = self._homes[id(tensor)][0]
        return _NOWHERE if stage in used else used[0]

    def take(self, tensor: torch.Tensor, stage: int, reader: str) -> torch.Tensor:
        """The tensor that `stage` reads when it reads this one; sends and receives it on its way there."""
        owner = self._home(tensor, stage) if id(tensor) in self._homes else self.stage_of(tensor)
        if owner > stage:
            raise refusal(
                f"{reader} belongs to stage {stage} and reads a value of stage {owner}.",
                "Values go from earlier stages to later ones; a block may not run again after a later one.",
                "Place the modules that take turns in one stage.",
            )
        if owner == stage == self._stage:
            return self._written.get(id(tensor), tensor)
        mine = self._stage
        if owner in (_NOWHERE, stage) or not owner <= mine <= stage:
            return tensor
        if owner < mine and id(tensor) not in self._came:
            with torch._C.DisableTorchFunction():
                got = self._receive(self._skeleton(tensor))
                self._came[id(tensor)] = usable(got)
            self.received.append(got)
            self._kept.append(tensor)
        real = self._came[id(tensor)] if owner < mine else self._written.get(id(tensor), tensor)
        if mine < stage and id(tensor) not in self._relayed:
            self._relayed.add(id(tensor))
            self._kept.append(tensor)
            self.sent.append(real)
            self._versions.append(real._version)
        return real if mine == stage else tensor

    def check_sent(self) -> None:
        """Raises where a value was written after a later stage read it: the message would have the "
        "new one."""
        for tensor, version in zip(self.sent, self._versions, strict=True):
            if tensor._version != version:
                raise PartialForwardError(
                    f"A value of shape {tuple(tensor.shape)} that a later stage reads is written in place "
                    "afterwards.",
                    "It is sent once, when the stage's part is done.",
                    "Write to a copy: x = x + y instead of x += y.",
                )

    def finish(self, output: Any) -> None:
        """Brings single numbers of the output (losses, counts) to the last stage."""
        for tensor in tensors_of(output):
            if tensor.numel() == 1 and _NOWHERE < self._tag_of(tensor) < self._last:
                self.take(tensor, self._last, "the output")

    def leave_if_done(self) -> None:
        """Ends the forward once everything that is known of it has happened."""
        if self._ends is None:
            return
        received, sent, calls = self._ends
        if len(self.received) >= received and len(self.sent) >= sent and self.unit_calls >= calls:
            raise Left

    def _tag_of(self, tensor: torch.Tensor) -> int:
        tag = tensor.__dict__.get(_TAG)
        return tag[1] if tag is not None and tag[0] is self._token else _NOWHERE

    # Units.

    def run_own(self, name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a unit of this stage."""
        self._position = max(self._position, self._stage)
        given = tensors_of((args, kwargs))
        with torch._C.DisableTorchFunction():
            real = {id(tensor): self.take(tensor, self._stage, name) for tensor in given}
            back = {id(real[id(tensor)]): (tensor, real[id(tensor)]._version) for tensor in given}
        if any(real[id(tensor)] is not tensor for tensor in given):
            args, kwargs = map_tensors((args, kwargs), lambda tensor: real[id(tensor)])
        with _pop_mode_temporarily():
            output = self._leaving(own(*args, **kwargs))
        with torch._C.DisableTorchFunction():
            output = self._own_output(output, back)
        self.unit_calls += 1
        self.leave_if_done()
        return output

    def _own_output(self, output: Any, given: dict[int, tuple[torch.Tensor, int]]) -> Any:
        """Tags what a unit made. An input that it returns as it came stays the value that it was."""
        swapped = False
        for tensor in tensors_of(output):
            original, version = given.get(id(tensor), (None, 0))
            if original is None or tensor._version != version:
                if id(tensor) not in self._homes:
                    self.tag(tensor, self._stage)
            elif original is not tensor:
                swapped = True
        if not swapped:
            return output

        def original_of(tensor: torch.Tensor) -> torch.Tensor:
            original, version = given.get(id(tensor), (tensor, tensor._version))
            return original if tensor._version == version else tensor

        return map_tensors(output, original_of)

    def run_absent(
        self, name: str, stage: int, skeletons: Skeletons, model: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of the forward of another stage's unit."""
        self._position = max(self._position, stage)
        given = tensors_of((args, kwargs))
        with torch._C.DisableTorchFunction():
            for tensor in given:
                self.take(tensor, stage, name)
            self.leave_if_done()
            forms = {id(tensor): self._skeleton(tensor) for tensor in given}
            outputs = skeletons.of(*map_tensors((args, kwargs), lambda tensor: forms[id(tensor)]))
            returned, escaped, made = outputs.fresh(given)
        for tensor in made:
            self.tag(tensor, stage)
        for escape, value in escaped:
            _replay(model.get_submodule(escape), value)
        return returned

    # Operations between units.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        if func == _DEVICE:
            found = func(*args, **kwargs)
            return self._device if found.type == "meta" else found
        if func in _PLACES:
            staged = args[0].device.type == "meta"
            return _PLACES[func] == f"is_{self._device.type}" if staged else func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        stage = self._stage_of_operation(name, leaves, args, kwargs)
        if stage == _NOWHERE:
            output = self._leaving(func(*args, **kwargs))
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    self.tag(tensor, _NOWHERE)
            return output
        output = self._operate(func, name, stage, args, kwargs)
        self.leave_if_done()
        return output

    def _stage_of_operation(self, name: str, leaves: list[torch.Tensor], args: Any, kwargs: Any) -> int:
        stage = max((self.stage_of(leaf) for leaf in leaves if id(leaf) not in self._homes), default=_NOWHERE)
        parameters = [leaf for leaf in leaves if id(leaf) in self._homes]
        if parameters and name != "__get__":
            stage = max(stage, *(self._home(leaf, stage) for leaf in parameters))
        if stage == _NOWHERE and name in _RANDOM and _draws(name, args, kwargs):
            stage = self._position  # a draw of everyone would not be the one that the stages agree on
        return stage

    def _operate(self, func: Any, name: str, stage: int, args: Any, kwargs: Any) -> Any:
        if name == "__iter__":
            return iter(self._operate(torch.unbind, "unbind", stage, args, kwargs))
        if stage != self._stage and name in _READS:
            raise refusal(
                f"{name} reads the numbers of a value that stage {stage} computes.",
                f"Stage {self._stage} runs the same code without them, so no branch may depend on them.",
                "Move the code into a block, or leave the decision to torch.where.",
            )

        def change(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                real = self.take(leaf, stage, name)
                return real if stage == self._stage else self._skeleton(leaf)
            return leaf

        target = args[0] if args and isinstance(args[0], torch.Tensor) and _writes(name) else None
        new_args, new_kwargs = pytree.tree_map(change, (args, kwargs))
        if stage == self._stage:
            output = self._leaving(func(*new_args, **new_kwargs))
            for tensor in _tensors(output):
                if id(tensor) not in self._homes:
                    self.tag(tensor, stage)
            if target is not None:
                self._write(target, stage, new_args[0])
            return output
        output = self._on_meta(func, name, stage, new_args, new_kwargs)
        if target is None:
            return output
        self._write(target, stage, self._skeleton(target) if output is None else skeleton(output))
        return None if output is None else target

    def _write(self, target: torch.Tensor, stage: int, result: torch.Tensor) -> None:
        """`target` is a value of this stage from now on."""
        if id(target) in self._homes:
            return
        base = None if isinstance(target, Absent) else target._base
        if base is not None and self._tag_of(base) < stage:
            self._write(base, stage, base)
        self.tag(target, stage)
        self._kept.append(target)
        self._came.pop(id(target), None)
        self._relayed.discard(id(target))
        if result is target:
            return
        if stage == self._stage:
            self._written[id(target)] = result
        else:
            self._forms[id(target)] = result

    def _on_meta(self, func: Any, name: str, stage: int, args: Any, kwargs: Any) -> Any:
        """The skeleton of an operation's result."""

        def to_meta(leaf: Any) -> Any:
            return torch.device("meta") if isinstance(leaf, torch.device) else leaf

        if name in _STAYS:
            output = args[0]
        else:
            kwargs = {key: "meta" if key == "device" else value for key, value in kwargs.items()}
            args, kwargs = pytree.tree_map(to_meta, (args, kwargs))
            if name == "to":
                args = tuple("meta" if _is_device(value) else value for value in args)
            try:
                output = self._computed(func, name, args, kwargs)
            except (NotImplementedError, RuntimeError) as error:
                raise refusal(
                    f"{name} of a value that stage {stage} computes has no form without its numbers "
                    f"({type(error).__name__}: {str(error).splitlines()[0]}).",
                    "Between the blocks the shapes of results depend on shapes alone.",
                    "Move the code into a block.",
                ) from error

        def mark(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            made = as_absent(leaf)
            self.tag(made, stage)
            return made

        return pytree.tree_map(mark, output)

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(self._device.type) or _writes(name) or name == "__get__":
            return func(*args, **kwargs)
        mode = FakeTensorMode()  # meta tensors are not cast; fakes of the device are

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return self._device if leaf == torch.device("meta") else leaf
            return FakeTensor(mode, leaf.detach(), self._device).requires_grad_(leaf.requires_grad)

        args, kwargs = pytree.tree_map(fake, (args, kwargs))
        with mode, torch._C.DisableTorchFunction():
            output = func(*args, **kwargs)
        return pytree.tree_map(
            lambda leaf: skeleton(absent(Form.of(leaf))) if isinstance(leaf, torch.Tensor) else leaf, output
        )

    def _skeleton(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in self._forms:
            return self._forms[id(tensor)]
        if id(tensor) in self._homes and (shape := self._homes[id(tensor)][1]) is not None:
            made = torch.empty(shape, dtype=tensor.dtype, device="meta")
            return made.requires_grad_(tensor.requires_grad)
        return skeleton(tensor)


def _as_it_is(value: Any) -> Any:
    return value


def _replay(module: nn.Module, output: Any) -> None:
    """Calls the hooks that look into a unit which is not run; they see absent values."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        module(None)
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _writes(name: str) -> bool:
    in_place_operator = name.startswith("__i") and name not in {
        "__iter__",
        "__index__",
        "__int__",
        "__invert__",
    }
    return in_place_operator or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _draws(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a random function draws: dropout does in training alone."""
    if "dropout" not in name:
        return True
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return bool(training) and kwargs.get("p", args[1] if len(args) > 1 else 0.5) != 0


def _is_device(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, torch.device)
    return value.partition(":")[0] in {"cpu", "cuda"}
