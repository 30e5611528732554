"""One stage: forward and backward of its part of the model, for the microbatches in flight."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from mlsys_engine.errors import InternalError
from mlsys_engine.optim import LossScaler
from mlsys_engine.pipeline.runtime.packing import Layout, Message, layout_of
from mlsys_engine.pipeline.runtime.random_state import generator_state, set_generator_state
from mlsys_engine.pipeline.runtime.split_backward import SplitBackward
from mlsys_engine.pipeline.runtime.ties import Tie

Call = Callable[[], Any]  # the whole model's forward of one microbatch
Receive = Callable[[torch.Tensor], torch.Tensor]


class PartResult(Protocol):
    """What a part of a forward left."""

    @property
    def output(self) -> Any: ...

    @property
    def sent(self) -> Sequence[torch.Tensor]: ...


class Part(Protocol):
    """A stage's part of a model's forward (pipeline.partial.StagePart)."""

    def run(self, forward: Call, receive: Receive, *, signature: Hashable) -> PartResult: ...


@dataclass
class _InFlight:
    """A microbatch between its forward and the end of its backward."""

    sent: tuple[torch.Tensor, ...]
    received: tuple[torch.Tensor | None, ...]
    loss: torch.Tensor | None
    halves: SplitBackward | None
    aliases: dict[str, torch.Tensor]  # of tied parameters that another stage owns
    first_terms: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)


class Stage:
    """Runs one stage. `ties` are those whose gradients are added in order."""

    def __init__(
        self,
        part: Part,
        model: nn.Module,
        *,
        stage: int,
        num_stages: int,
        device: torch.device,
        ties: Sequence[Tie] = (),
        scaler: LossScaler | None = None,
    ) -> None:
        self._part, self._device, self._scaler = part, device, scaler
        self._stage, self._is_last = stage, stage + 1 == num_stages
        self._in_flight: dict[int, _InFlight] = {}
        self._owned: dict[str, nn.Parameter] = {}
        self._borrowed: dict[str, nn.Parameter] = {}
        self._slots: dict[str, list[tuple[nn.Module, str]]] = {}
        for tie in ties:
            if names := tie.names(stage):
                own = self._owned if tie.owner == stage else self._borrowed
                own[tie.name] = model.get_parameter(names[0])
                # All its names, also those on other stages: it stays one parameter while it is replaced.
                paths = [name.rpartition(".") for _, every in tie.fqns for name in every]
                self._slots[tie.name] = [(model.get_submodule(path), leaf) for path, _, leaf in paths]
        # Shares that cross from the next stage, and to the one before, as the last tensors of a message.
        shapes = {
            tie.name: (tuple(own.shape), own.dtype)
            for tie in ties
            for own in (model.get_parameter(tie.names(tie.owner)[0]),)
        }
        self._shares = {t.name: shapes[t.name] for t in ties if t.owner <= stage < t.stages[-1]}
        self._shares_back = {t.name: shapes[t.name] for t in ties if t.owner < stage <= t.stages[-1]}

    def forward(
        self,
        microbatch: int,
        call: Call,
        arrived: Callable[[], Message] | None,
        *,
        signature: Hashable,
        split: bool,
    ) -> tuple[Any, Message]:
        """Runs its part of `call`; the output (None before the last stage), and what crosses to the next.

        `arrived` waits for what crosses from the stage before; `signature` is equal for microbatches of the
        same form. With `split` the backward comes in halves.
        """
        inbox = _Inbox(arrived, self._device)
        halves = SplitBackward() if split and torch.is_grad_enabled() else None
        with ExitStack() as stack:
            aliases = stack.enter_context(self._aliased())
            if halves is not None:
                stack.enter_context(halves)
            result = self._part.run(call, inbox.receive, signature=signature)
        inbox.close(self._stage, microbatch)
        sent = tuple(result.sent)
        state = None if self._is_last else generator_state(self._device)
        if torch.is_grad_enabled():
            self._in_flight[microbatch] = _InFlight(sent, inbox.tensors, None, halves, aliases)
        crossing = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in sent)
        return result.output, Message(crossing, state)

    def set_loss(self, microbatch: int, loss: torch.Tensor | None) -> None:
        """What the backward of the last stage begins with; None for a microbatch that counts nothing."""
        self._in_flight[microbatch].loss = loss

    def gradient_layout(self, microbatch: int) -> Layout | None:
        """Of what comes back from the next stage; None before the forward."""
        held = self._in_flight.get(microbatch)
        if held is None:
            return None
        crossed = layout_of([tensor for tensor in held.sent if tensor.requires_grad])
        return Layout((*crossed.tensors, *self._shares.values()))

    def backward(self, microbatch: int, arrived: Message | None) -> tuple[Message, Layout]:
        """Backward of what crossed and of the loss; gives what goes back to the stage before.

        Of a microbatch whose forward ran with `split` this is the first half.
        """
        held = self._in_flight[microbatch]
        roots = self._roots(held, arrived)
        shares = self._arrived_shares(arrived)
        for name, share in shares.items():
            if share is None:
                continue
            if name in self._owned and held.halves is not None:
                held.first_terms[self._owned[name]] = share
            elif name in held.aliases or name in self._owned:
                roots.append((held.aliases.get(name, self._owned.get(name)), share))
        if roots:
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        leaves = [leaf for leaf in held.received if leaf is not None and leaf.requires_grad]
        back = [leaf.grad for leaf in leaves]
        back += [
            held.aliases[name].grad if name in held.aliases else shares.get(name)
            for name in self._shares_back
        ]
        layout = Layout((*layout_of(leaves).tensors, *self._shares_back.values()))
        if held.halves is None:
            del self._in_flight[microbatch]
        else:
            held.sent, held.received, held.loss, held.aliases = (), (), None, {}
        return Message(tuple(back)), layout

    def _roots(self, held: _InFlight, arrived: Message | None) -> list[tuple[Any, torch.Tensor]]:
        """Where the backward begins, with the gradients there."""
        crossed = [tensor for tensor in held.sent if tensor.requires_grad]
        gradients = () if arrived is None else arrived.tensors
        roots = [
            (tensor, gradient)
            for tensor, gradient in zip(crossed, gradients, strict=False)  # shares come after them
            if gradient is not None
        ]
        if held.loss is not None:
            loss = held.loss if self._scaler is None else self._scaler.scale(held.loss)
            roots.append((loss, torch.ones_like(loss)))
        return roots

    def _arrived_shares(self, arrived: Message | None) -> dict[str, torch.Tensor | None]:
        if arrived is None or not self._shares:
            return {}
        return dict(zip(self._shares, arrived.tensors[-len(self._shares) :], strict=True))

    def weights(self, microbatch: int) -> None:
        """The second half: gradients of weights."""
        held = self._in_flight.pop(microbatch)
        assert held.halves is not None
        held.halves.weights(held.first_terms)

    def cancel(self) -> None:
        """Forgets the microbatches of a step that raised."""
        self._in_flight = {}

    @contextmanager
    def _aliased(self) -> Iterator[dict[str, torch.Tensor]]:
        """Borrowed parameters are leaves of their own in this forward, so that their gradient is apart."""
        if not torch.is_grad_enabled():
            yield {}
            return
        with torch._C.DisableTorchFunction():  # of what is held, also where that is a part
            aliases = {name: own.detach().requires_grad_() for name, own in self._borrowed.items()}
        for name, alias in aliases.items():
            for module, leaf in self._slots[name]:
                module._parameters[leaf] = alias  # type: ignore[assignment]
        try:
            yield aliases
        finally:
            for name, own in self._borrowed.items():
                for module, leaf in self._slots[name]:
                    module._parameters[leaf] = own


class _Inbox:
    """What crosses into a stage, one by one, in the order in which its part asks."""

    def __init__(self, arrived: Callable[[], Message] | None, device: torch.device) -> None:
        self._arrived, self._device = arrived, device
        self._message: Message | None = None
        self._taken = 0

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return () if self._message is None else self._message.tensors

    def receive(self, skeleton: torch.Tensor) -> torch.Tensor:
        if self._arrived is None:
            raise InternalError("the first stage of a pipeline asked for a value of an earlier one")
        if self._message is None:
            self._message = self._arrived()
            if self._message.state is not None:
                set_generator_state(self._message.state, self._device)
        tensor = self._message.tensors[self._taken] if self._taken < len(self._message.tensors) else None
        if tensor is None or tensor.shape != skeleton.shape or tensor.dtype != skeleton.dtype:
            raise InternalError(
                f"value {self._taken} that crosses between stages is "
                f"{'missing' if tensor is None else (tuple(tensor.shape), tensor.dtype)} where "
                f"{tuple(skeleton.shape)}, {skeleton.dtype} is read"
            )
        self._taken += 1
        return tensor

    def close(self, stage: int, microbatch: int) -> None:
        """A message has to be taken off its link even where nothing of it is read."""
        if self._arrived is not None and self._message is None:
            self._message = self._arrived()
        if self._taken != len(self.tensors):
            raise InternalError(
                f"stage {stage} read {self._taken} of the {len(self.tensors)} values that crossed for "
                f"microbatch {microbatch}"
            )
