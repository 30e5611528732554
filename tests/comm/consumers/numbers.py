"""Models and data for the consumers: either ordinary floats, or floats that add up exactly in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WIDTH, HIDDEN, BATCH = 8, 16, 8


@dataclass(frozen=True)
class Numbers:
    """Ordinary float32 numbers, or `exact` ones: float64 multiples of 1/8 with few bits.

    Two addends give the same sum in either order, so two ranks may be compared on ordinary numbers. With more
    ranks backends add in different orders: there every product and sum of the exact numbers fits the 53 bits
    of a float64 (three layers of 3-bit weights and 3-bit inputs over sums of at most 16 x 32 terms stay below
    40), so any order gives the same bits.
    """

    exact: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.exact else torch.float32

    def draw(self, seed: int, *shape: int) -> Tensor:
        """The same tensor on every rank."""
        generator = torch.Generator().manual_seed(seed)
        if self.exact:
            return torch.randint(-3, 4, shape, generator=generator).to(self.dtype)
        return torch.randn(*shape, generator=generator)

    def activation(self) -> nn.Module:
        return nn.ReLU() if self.exact else nn.Tanh()

    def linear(self, seed: int, inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, dtype=self.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.draw(seed, outputs, inputs) / 8)
            layer.bias.copy_(self.draw(seed + 1, outputs) / 8)
        return layer

    def model(self) -> nn.Sequential:
        """Three linear layers with activations between them."""
        return nn.Sequential(
            self.linear(10, WIDTH, HIDDEN),
            self.activation(),
            self.linear(20, HIDDEN, HIDDEN),
            self.activation(),
            self.linear(30, HIDDEN, WIDTH),
        )

    def batch(self, step: int, rank: int) -> Tensor:
        return self.draw(1000 * step + rank, BATCH, WIDTH)

    def loss(self, output: Tensor) -> Tensor:
        weights = self.draw(99, *output.shape[1:]).to(output.dtype)
        return (output * weights).sum() if self.exact else (output * weights).square().mean()

    def settle(self, parameters: Iterable[Tensor]) -> None:
        """Brings updated exact parameters back to 3 bits, so that the next step is exact too."""
        if not self.exact:
            return
        for parameter in parameters:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.detach().mul_(8).round_().clamp_(-3, 3).div_(8)


def train(
    model: nn.Module,
    numbers: Numbers,
    rank: int,
    *,
    steps: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Trains for a few steps and returns every step's loss and gradients and the last parameters, full."""
    optimizer = optimizer or torch.optim.SGD(
        model.parameters(), lr=2.0**-5, momentum=0.0 if numbers.exact else 0.9
    )
    seen: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        value = (loss or numbers.loss)(model(numbers.batch(step, rank)))
        value.backward()
        seen[f"loss {step}"] = value.detach()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[f"gradient {step} {name}"] = whole(parameter.grad)
        optimizer.step()
        numbers.settle(model.parameters())
    return seen | {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a DTensor, gathered; a copy of any other."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()
