"""Muon (Jordan et al. 2024): orthogonalised momentum for hidden matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import FlatArena
from mlsys_engine.optim.base import Group, NativeOptimizer
from mlsys_engine.optim.checks import check_betas, check_flag_is_off, check_range
from mlsys_engine.optim.formats import Precision
from mlsys_engine.optim.kernels import is_native
from mlsys_engine.optim.rules.adamw import AdamW
from mlsys_engine.optim.rules.muon_parts import MuonParts
from mlsys_engine.optim.rules.orthogonal import COEFFICIENTS

LEARNING_RATE_RULES = (None, "original", "match_rms_adamw")
ADAMW_OPTIONS = ("lr", "weight_decay", "betas", "eps")
# Parts of a name that tell of tables and of the last layer, whose gradients are sparse or of another kind.
NOT_HIDDEN = ("emb", "wte", "wpe", "lm_head", "classifier")


class Muon(NativeOptimizer):
    """Muon on float32 parameters; loads and saves the state of torch.optim.Muon.

    Parameters of two or more dimensions (more are seen as [first, rest]) whose names are not those of
    embeddings or heads are stepped by Muon, the others by AdamW: every group given is divided in two, unless
    it says itself with `use_muon`. Pass named parameters, or nothing tells an embedding from a hidden layer.
    AdamW's groups take the options that begin with `adamw_`; None for rate and decay means Muon's own. The
    products are in bfloat16 on CUDA, as torch's, and in float32 elsewhere, unless `ns_dtype` says otherwise.
    """

    rule: ClassVar[str] = "muon_momentum"
    counts_steps: ClassVar[bool] = False
    # Of AdamW's groups; momenta of matrices are exact.
    moment_kinds: ClassVar[Mapping[str, str]] = AdamW.moment_kinds
    elementwise: ClassVar[bool] = False  # orthogonalisation needs whole matrices
    shardable: ClassVar[bool] = False
    separable: ClassVar[bool] = False

    _parts: MuonParts | None = None
    _arenas: tuple[tuple[FlatArena, FlatArena], ...] = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        ns_dtype: torch.dtype | None = None,
        maximize: bool = False,
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        **precision: Unpack[Precision],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "ns_dtype": ns_dtype,
                "maximize": maximize,
                "adamw_lr": adamw_lr,
                "adamw_weight_decay": adamw_weight_decay,
                "adamw_betas": adamw_betas,
                "adamw_eps": adamw_eps,
                "differentiable": False,
                "use_muon": True,
            },
            precision,
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        sign = -1.0 if group["maximize"] else 1.0
        return group["momentum"], 1.0 if group["nesterov"] else 0.0, sign

    def check_group(self, group: Group) -> None:
        check_range("lr", group["lr"])
        check_range("weight_decay", group["weight_decay"])
        check_range("momentum", group["momentum"], below=1.0)
        check_range("eps", group["eps"])
        check_betas(group["betas"] if "betas" in group else group["adamw_betas"])
        check_flag_is_off(group, "differentiable", "Switch it off, or use torch.optim.Muon.")
        if group["use_muon"] and group["moments"] != "fp32":
            raise ConfigError(
                f"moments={group['moments']!r} was given for matrices that Muon steps.",
                "Their momentum is float32.",
                "Give it to a group with use_muon=False, whose moments are AdamW's.",
            )
        if len(group["ns_coefficients"]) != 3:
            raise ConfigError(
                f"ns_coefficients={group['ns_coefficients']} was given.",
                "Three are expected, of x, x^3 and x^5.",
                "Leave them out for those of Jordan et al. 2024.",
            )
        if not isinstance(group["ns_steps"], int) or not 0 <= group["ns_steps"] < 100:
            raise ConfigError(
                f"ns_steps={group['ns_steps']} was given.",
                "From 0 to 99 rounds are expected.",
                "Five bring every singular value near one.",
            )
        if group["adjust_lr_fn"] not in LEARNING_RATE_RULES:
            raise ConfigError(
                f"adjust_lr_fn={group['adjust_lr_fn']!r} was given.",
                'None, "original" or "match_rms_adamw" is expected.',
                'Take "match_rms_adamw" to go on with the learning rate of AdamW.',
            )

    # ---- groups

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; one without `use_muon` becomes two where it holds both kinds of parameters."""
        given = param_group.get("params") if isinstance(param_group, dict) else None
        if given is None or isinstance(given, set):
            super().add_param_group(param_group)  # which refuses it
            return
        items = [given] if isinstance(given, Tensor) else list(given)
        if "use_muon" in param_group:
            self._add({**param_group, "params": items})
            return
        matrices = [item for item in items if is_hidden_matrix(item)]
        others = [item for item in items if not is_hidden_matrix(item)]
        options = {**self.defaults, **param_group}
        # What the group gives is meant for Muon; AdamW takes it only where it has nothing of its own.
        ours = {key: options[f"adamw_{key}"] for key in ADAMW_OPTIONS if options[f"adamw_{key}"] is not None}
        if matrices or not items:
            self._add({**param_group, "params": matrices, "use_muon": True})
        if others:
            self._add({**param_group, **ours, "params": others, "use_muon": False})

    def _add(self, group: Group) -> None:
        if not group["use_muon"]:
            options = {**self.defaults, **group}
            for key in ADAMW_OPTIONS:
                if options[f"adamw_{key}"] is not None:
                    group.setdefault(key, options[f"adamw_{key}"])
        for item in group["params"] if group["use_muon"] else ():
            parameter = item[1] if isinstance(item, tuple) else item
            if isinstance(parameter, Tensor) and parameter.ndim < 2:
                raise ConfigError(
                    f"A parameter of shape {tuple(parameter.shape)} is in a group with use_muon=True.",
                    "Muon steps matrices.",
                    "Put it into a group with use_muon=False, or leave use_muon out.",
                )
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parts = None

    # ---- the step

    def adopt(self, params: FlatArena, grads: FlatArena) -> None:
        """As every optimizer's; the momenta of matrices stay where they are."""
        self._arenas = (*self._arenas, (params, grads))
        self._current_parts().adopt(params, grads)

    def step_on(
        self,
        grads: list[Tensor | None],
        grad_scale: float | Tensor,
        skip: bool | Tensor,
        zero_grad: bool = False,
    ) -> None:
        """As every optimizer's; gradients of all are checked before anything changes."""
        self._announce([parameter for parameter in self._parameters() if not is_native(parameter.device)])
        self._current_parts().step(grads, grad_scale, skip, zero_grad)

    def _current_parts(self) -> MuonParts:
        parts = self._parts
        if parts is None or not parts.is_current(self):
            parts = self._parts = MuonParts(self)
            for params, grads in self._arenas:
                parts.adopt(params, grads)
        return parts


def is_hidden_matrix(item: Any) -> bool:
    """Whether Muon steps it by default: a matrix or more, not an embedding or a head by its name."""
    name, parameter = item if isinstance(item, tuple) else ("", item)
    if not isinstance(parameter, Tensor) or parameter.ndim < 2 or parameter.numel() == 0:
        return False
    parts = str(name).lower().split(".")
    return not any(part == "head" or any(word in part for word in NOT_HIDDEN) for part in parts)
