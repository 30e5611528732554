"""Cheap operations whose output can be computed again, bit for bit, from what their nodes save anyway.

`rebuild(node, ...)` gives a function that computes the node's output again, or None. Ownership: a node owns
what was packed for it, and what is packed for a node that saves its own result owns the function. So the
function may hold a node only if that node does not save its result (torch's garbage collector cannot see
such a circle); an operation that saves its result is computed from the node before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rebuild = Callable[[], Tensor]
FindEps = Callable[[Any], float | None]

_MOST_NESTED = 4  # operations in one function; each costs a pass over the tensor

# Nodes whose output is a view of their first input's storage.
VIEWS = frozenset(
    {
        "AliasBackward0",
        "ExpandBackward0",
        "PermuteBackward0",
        "ReshapeAliasBackward0",
        "SelectBackward0",
        "SliceBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "SqueezeBackward2",
        "TBackward0",
        "TransposeBackward0",
        "UnsafeViewBackward0",
        "UnsqueezeBackward0",
        "ViewBackward0",
    }
)


def _signed(dim: int) -> int:
    """A dimension that a node shows as an unsigned number of 64 bits: -1 as 2**64 - 1."""
    return dim - 2**64 if dim >= 2**63 else dim


# From what the node saves alone; none of these saves its result.
_FROM_SAVED: dict[str, Callable[[Any], Tensor]] = {
    "CeluBackward0": lambda node: F.celu(node._saved_self, node._saved_alpha),
    "EluBackward0": lambda node: torch._C._nn.elu(
        node._saved_self, node._saved_alpha, node._saved_scale, node._saved_input_scale
    ),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "GluBackward0": lambda node: F.glu(node._saved_self, _signed(node._saved_dim)),
    "HardsigmoidBackward0": lambda node: F.hardsigmoid(node._saved_self),
    "HardswishBackward0": lambda node: F.hardswish(node._saved_self),
    "HardtanhBackward0": lambda node: F.hardtanh(node._saved_self, node._saved_min_val, node._saved_max_val),
    "LeakyReluBackward0": lambda node: F.leaky_relu(node._saved_self, node._saved_negative_slope),
    "MishBackward0": lambda node: F.mish(node._saved_self),
    "PowBackward0": lambda node: torch.pow(node._saved_self, node._saved_exponent),
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "SoftplusBackward0": lambda node: F.softplus(node._saved_self, node._saved_beta, node._saved_threshold),
}

# These save their result: computed from the result of the node before.
_FROM_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "ExpBackward0": torch.exp,
    "ReluBackward0": torch.relu,
    "RsqrtBackward0": torch.rsqrt,
    "SigmoidBackward0": torch.sigmoid,
    "SqrtBackward0": torch.sqrt,
    "TanhBackward0": torch.tanh,
}
_SAVES_RESULT = frozenset({*_FROM_INPUT, "SoftmaxBackward0", "SafeSoftmaxBackward0"})

# What may have changed its input in place, so that the output's version is 1.
MAY_BE_IN_PLACE = frozenset(
    {
        *("CeluBackward0", "HardsigmoidBackward0", "HardswishBackward0", "HardtanhBackward0"),
        *("MishBackward0", "SiluBackward0", "MulBackward0", "DivBackward0"),
        *_FROM_INPUT,
    }
)

_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "DivBackward0": torch.div,
    "MulBackward0": torch.mul,
}


def rebuild(node: Any, dtype: torch.dtype, find_eps: FindEps) -> Rebuild | None:
    """A function that computes the output of `node` again, of that dtype; None where that cannot be done.

    It reads saved tensors when it is called, without grad and autocast. `find_eps` gives the eps of a
    LayerNorm's node, which does not save it.
    """
    name = type(node).__name__
    if name == "ToCopyBackward0":
        before = _value(node, 0, find_eps, 1)
        return None if before is None else lambda: before().to(dtype)
    return _output(node, name, find_eps, 0)


def _output(node: Any, name: str, find_eps: FindEps, depth: int) -> Rebuild | None:
    if (compute := _FROM_SAVED.get(name)) is not None:
        return lambda: compute(node)
    if (product := _PRODUCTS.get(name)) is not None:
        return _product(node, product, name, find_eps, depth)
    if (apply := _FROM_INPUT.get(name)) is not None:
        before = _value(node, 0, find_eps, depth + 1)
        return None if before is None else lambda: apply(before())
    if name == "NativeLayerNormBackward0":
        eps = find_eps(node)
        return None if eps is None else lambda: layer_norm(node, eps)[0]
    norm = _NORMS.get(name)
    return None if norm is None else norm(node)


def _value(node: Any, index: int, find_eps: FindEps, depth: int) -> Rebuild | None:
    """The input `index` of the node as the node before it gives it, saved or computed again."""
    before, output = node.next_functions[index]
    if before is None or output != 0 or depth >= _MOST_NESTED:
        return None
    name = type(before).__name__
    if name in _SAVES_RESULT:
        return lambda: before._saved_result
    return _output(before, name, find_eps, depth)


def _product(
    node: Any, product: Callable[[Tensor, Tensor], Tensor], name: str, find_eps: FindEps, depth: int
) -> Rebuild | None:
    # An operand is saved when the other one needs a gradient; the divisor also when the dividend does.
    first, second = node.next_functions
    has_self = second[0] is not None
    has_other = first[0] is not None or name == "DivBackward0"
    if has_self and has_other:
        return lambda: product(node._saved_self, node._saved_other)
    if has_other:
        own = _value(node, 0, find_eps, depth + 1)
        return None if own is None else lambda: product(own(), node._saved_other)
    other = _value(node, 1, find_eps, depth + 1)
    return None if other is None else lambda: product(node._saved_self, other())


def layer_norm(node: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and reciprocal deviation of a LayerNorm's node, for that eps."""
    return torch.native_layer_norm(
        node._saved_input, node._saved_normalized_shape, node._saved_weight, node._saved_bias, eps
    )


def _batch_norm(node: Any) -> Rebuild | None:
    bias = _bias(node)
    if bias is None:
        return None
    if node._saved_training:  # without running statistics, which have been counted

        def train() -> Tensor:
            x, weight = node._saved_input, node._saved_weight
            return torch.native_batch_norm(x, weight, bias(), None, None, True, 0.0, node._saved_eps)[0]

        return train

    def evaluate() -> Tensor:
        mean, variance = node._saved_running_mean, node._saved_running_var
        x, weight = node._saved_input, node._saved_weight
        return torch.native_batch_norm(x, weight, bias(), mean, variance, False, 0.0, node._saved_eps)[0]

    return evaluate


def _group_norm(node: Any) -> Rebuild | None:
    bias = _bias(node)
    if bias is None:
        return None

    def normalise() -> Tensor:
        x, sizes = node._saved_input, (node._saved_N, node._saved_C, node._saved_HxW)
        groups, eps = node._saved_group, node._saved_eps
        return torch.native_group_norm(x, node._saved_weight, bias(), *sizes, groups, eps)[0]

    return normalise


def _bias(node: Any) -> Callable[[], Tensor | None] | None:
    """The bias of a norm that does not save it; None when it is not a parameter in the graph.

    Without a gradient it leaves no trace, and there may or may not have been one: where the weight has a
    gradient and the bias has none, nothing is known.
    """
    holder = node.next_functions[2][0]
    if holder is None:
        return None
    variable = getattr(holder, "variable", None)
    if variable is None:
        return None
    version = variable._version

    def read() -> Tensor:
        if variable._version != version:
            raise RuntimeError(
                f"A norm's bias of shape {tuple(variable.shape)} was changed between forward and backward. "
                f'The policy "selective" computes the norm again from it. Step the optimizer after the '
                f"backward."
            )
        return variable

    return read


_NORMS: dict[str, Callable[[Any], Rebuild | None]] = {
    "NativeBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": _group_norm,
}
# Whose output may be computed again, when its inputs are there.
CHEAP = frozenset(
    {
        *_FROM_SAVED,
        *_FROM_INPUT,
        *_PRODUCTS,
        *_NORMS,
        "NativeLayerNormBackward0",
        "ToCopyBackward0",
    }
)
