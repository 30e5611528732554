"""What a model holds, read from the module tree without running it."""

from __future__ import annotations

from torch import nn

from mlsys_engine.trace.values import BufferInfo, ModuleInfo, ParameterInfo


def parameters(model: nn.Module) -> tuple[ParameterInfo, ...]:
    """Every distinct parameter, under the first of its names."""
    return tuple(
        ParameterInfo(
            fqn=fqn,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            requires_grad=parameter.requires_grad,
        )
        for fqn, parameter in model.named_parameters()
    )


def ties(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters: alias FQN -> first FQN."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), fqn)
        if canonical != fqn:
            aliases[fqn] = canonical
    return aliases


def buffers(model: nn.Module) -> tuple[BufferInfo, ...]:
    """Every distinct buffer, and whether it is part of the state dictionary."""
    derived = {
        _join(prefix, name)
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return tuple(
        BufferInfo(fqn=fqn, shape=tuple(buffer.shape), dtype=buffer.dtype, persistent=fqn not in derived)
        for fqn, buffer in model.named_buffers()
    )


def modules(model: nn.Module) -> tuple[ModuleInfo, ...]:
    """Every module in registration order, with the parameters that it holds itself (tied names included)."""
    return tuple(
        ModuleInfo(
            fqn=fqn,
            class_name=type(module).__name__,
            is_leaf=next(module.children(), None) is None,
            parameters=tuple(
                _join(fqn, name) for name, parameter in module._parameters.items() if parameter is not None
            ),
        )
        for fqn, module in model.named_modules()
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
