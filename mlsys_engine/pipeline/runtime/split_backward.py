"""The two halves of a backward: gradients of inputs first, those of weights when a schedule asks for them.

A zero-bubble schedule (Qi et al. 2023, https://arxiv.org/abs/2401.10241) sends the gradient of a stage's
input before it computes those of its weights. Both come from the graph that autograd recorded in the forward:
an operation that takes a weight directly keeps its own small graph, from which the first half takes the
gradient of the input and the second that of the weight. The formulas are torch's own and nothing is computed
twice, so the bits are those of a whole backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

# Where the weight's gradient is a product of its own. Others give it together with the input's (norms), or it
# is a sum (biases, scales): there it is computed in the first half, and only added in the second.
_PRODUCTS = frozenset(
    {
        functional.linear,
        functional.embedding,
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
        torch.addmm,
        torch.mm,
        torch.bmm,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
        torch.Tensor.addmm,
    }
)
_Use = Callable[[], Iterable[tuple[nn.Parameter, torch.Tensor | None]]]


class SplitBackward(TorchFunctionMode):
    """One microbatch's forward runs under this mode; after its backward, `weights` gives the second half.

    Parameters in `whole` are left to autograd, so their gradients are there after the first half.
    """

    def __init__(self, whole: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._whole = {id(parameter) for parameter in whole}
        # Makes outputs require a gradient; parameters as inputs would have hooks run in the first half.
        self._anchor = torch.zeros((), requires_grad=True)
        self._uses: list[_Use] = []  # in the order in which backward reached them

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if not any(self._is_deferred(leaf) for leaf in leaves) or _only_looks(func):
            return func(*args, **kwargs)
        if func in _PRODUCTS:
            return self._product(func, leaves, spec)
        own = [
            _Kept.apply(self._anchor, self._uses, [leaf]) if self._is_deferred(leaf) else leaf
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(own, spec)
        return func(*args, **kwargs)

    def weights(self, first: Mapping[nn.Parameter, torch.Tensor] | None = None) -> None:
        """Adds every weight's gradient to its `.grad`; `first` has the first term of some sums.

        The uses of one weight are added in the order of a whole backward before they reach `.grad`.
        """
        sums: dict[nn.Parameter, torch.Tensor] = dict(first or {})
        for use in self._uses:
            for parameter, gradient in use():
                if gradient is not None:
                    sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
        self._uses = []
        if sums:  # a leaf as root: its gradient goes through its hooks
            torch.autograd.backward(list(sums), list(sums.values()))

    def _is_deferred(self, leaf: Any) -> bool:
        return (
            isinstance(leaf, nn.Parameter)
            and leaf.requires_grad
            and not leaf.is_meta
            and id(leaf) not in self._whole
        )

    def _product(self, func: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
        leaves, parameters = list(leaves), []
        inputs = []
        for place, leaf in enumerate(leaves):
            if self._is_deferred(leaf):
                # Its graph ends in a leaf of its own: hooks on the parameter are for the sum of all uses.
                parameters.append((leaf, leaf.detach().requires_grad_()))
                leaves[place] = parameters[-1][1]
            elif isinstance(leaf, torch.Tensor):
                inputs.append(place)

        def call(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            given = list(leaves)
            for place, tensor in zip(inputs, tensors, strict=True):
                given[place] = tensor
            args, kwargs = tree_unflatten(given, spec)
            result: torch.Tensor = func(*args, **kwargs)
            return result

        return _Product.apply(
            self._anchor, self._uses, call, parameters, *(leaves[place] for place in inputs)
        )


class _Product(torch.autograd.Function):
    """`call` of the input tensors, whose own graph is kept for the weights' gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        uses: list[_Use],
        call: Callable[[Sequence[torch.Tensor]], torch.Tensor],
        parameters: list[tuple[nn.Parameter, torch.Tensor]],
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        own = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        with torch.enable_grad():
            output = call(own)
        # The place of the output in its graph: backward needs no more of it, and the halves may be far apart.
        edge = torch.autograd.graph.get_gradient_edge(output)
        ctx.uses, ctx.parameters, ctx.own, ctx.edge = uses, parameters, own, edge
        return output.data  # of the same memory, but no view: what follows may write into it

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        own, edge, parameters = ctx.own, ctx.edge, ctx.parameters
        found: list[Any] = [None] * len(own)
        places = [place for place, tensor in enumerate(own) if tensor.requires_grad]
        if places:
            inputs = [own[place] for place in places]
            gradients = torch.autograd.grad(edge, inputs, gradient, retain_graph=True, allow_unused=True)
            for place, value in zip(places, gradients, strict=True):
                found[place] = value

        def use() -> Iterable[tuple[nn.Parameter, torch.Tensor | None]]:
            leaves = [leaf for _, leaf in parameters]
            gradients = torch.autograd.grad(edge, leaves, gradient, allow_unused=True)
            return zip([parameter for parameter, _ in parameters], gradients, strict=True)

        ctx.uses.append(use)
        ctx.own = ctx.edge = None
        return None, None, None, None, *found


class _Kept(torch.autograd.Function):
    """The parameter itself, in a list; its gradient is kept instead of being added to `.grad`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, uses: list[_Use], parameter: list[nn.Parameter]
    ) -> torch.Tensor:
        ctx.uses, ctx.parameter = uses, parameter[0]
        return parameter[0].data

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        parameter = ctx.parameter
        ctx.uses.append(lambda: ((parameter, gradient),))
        return None, None, None


def _only_looks(func: Callable[..., Any]) -> bool:
    """Whether `func` reads an attribute (`shape`, `dtype`, ...) and computes nothing."""
    return getattr(func, "__name__", "") in (
        "__get__",
        "size",
        "dim",
        "stride",
        "numel",
        "__hash__",
        "data_ptr",
    )
