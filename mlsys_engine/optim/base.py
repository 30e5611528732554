"""NativeOptimizer: a torch.optim.Optimizer whose step is one native call over a segment table."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import FlatArena
from mlsys_engine.optim import distributed
from mlsys_engine.optim.adopted import AdoptedArena
from mlsys_engine.optim.checks import check_keywords, check_parameter
from mlsys_engine.optim.formats import PRECISION, Form, Precision, check_precision, form_of
from mlsys_engine.optim.kernels import is_native
from mlsys_engine.optim.loading import matched_by_name, restore_wide
from mlsys_engine.optim.norms import sum_over_gradients
from mlsys_engine.optim.plan import StepPlan
from mlsys_engine.optim.state import StepCounts, ensure_state

Group = dict[str, Any]


class NativeOptimizer(torch.optim.Optimizer):
    """Base of the native optimizers; drop-in for torch's: same options, hooks, state and semantics.

    Beyond torch: `adopt` (flat arenas), `sum_of_squares` and `step_scaled` (norm and clipped step in two
    sweeps), and the keywords of `Precision` for parameters and moments narrower than float32.
    Parameters whose `.grad` is None are left alone. A rule is a subclass with the members marked "rule"
    below, one file in csrc/optim/rules and one line in registry.py.
    """

    rule: ClassVar[str]  # rule: the native operator is torch.ops.mlsys.<rule>_step
    counts_steps: ClassVar[bool]  # rule: whether state[p]["step"] exists, as in torch's own state
    # Rule: which moments may be narrowed: "signed", or "unsigned" for sums of squares. Others stay float32.
    moment_kinds: ClassVar[Mapping[str, str]] = MappingProxyType({})
    elementwise: ClassVar[bool] = True  # rule: whether any part of a parameter steps by itself
    shardable: ClassVar[bool] = True  # rule: whether that takes nothing but segments and hyper rows
    separable: ClassVar[bool] = True  # rule: whether parameters may step one by one
    steps_dtensors: ClassVar[bool] = False  # rule, not elementwise: whether torch_step works on DTensors
    defaults: Group

    _step_supports_amp_scaling: ClassVar[bool] = True  # torch.amp.GradScaler need not unscale before `step`

    # Caches, rebuilt on demand: torch's pickling and deepcopy carry defaults, state and groups only.
    _plan: StepPlan | None = None
    _steps: StepCounts | None = None
    _adopted: tuple[AdoptedArena, ...] = ()
    _announced: bool = False

    def __init__(self, params: ParamsT, defaults: Group, precision: Precision | None = None) -> None:
        check_keywords(type(self).__name__, precision or {}, PRECISION)
        defaults = {**defaults, **PRECISION, **(precision or {})}
        self._check_group(defaults)
        super().__init__(
            params if isinstance(params, Tensor) else _listed(params, type(self).__name__), defaults
        )

    # ---- what a rule defines

    @abstractmethod
    def moment_names(self, group: Group) -> tuple[str, ...]:
        """Rule: keys of the moments that this group needs now, in the order of the kernel's states."""

    @abstractmethod
    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        """Rule: this group's row of the hyper-parameter table, in the order of the rule's `enum Hyper`."""

    @abstractmethod
    def check_group(self, group: Group) -> None:
        """Rule: raises ConfigError for hyper-parameters that cannot work."""

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        """Rule: torch's own fastest step on self.state, for devices that have no native kernels.

        `fresh` tells of each parameter whether this is its first step. Rules with a `step_on` of their own
        need none.
        """
        raise ConfigError(
            f"{type(self).__name__} has parameters on {params[0].device}.",
            "This build has no kernels for that device, and the rule has no torch_step for it.",
            "Move the model to the CPU, or give the rule a torch_step.",
        )

    # ---- torch.optim.Optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as torch's: calls `closure` with gradients enabled, if given, and returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch.amp.GradScaler leaves both here for the time of the call.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._advance(1.0 if scale is None else 1.0 / scale, False if found_inf is None else found_inf > 0)
        return loss

    @torch.optim.Optimizer.profile_hook_step
    def step_scaled(
        self, *, grad_scale: float | Tensor = 1.0, skip: bool | Tensor = False, zero_grad: bool = False
    ) -> None:
        """The step with gradients multiplied by `grad_scale` as they are read (they are not changed).

        With `skip` nothing happens at all: no decay, no momentum, no step count. Scalars on the parameters'
        own device are not waited for. With `zero_grad` the gradients are zeroed in the same pass.
        """
        self._advance(grad_scale, skip, zero_grad)
        self._opt_called = True  # what torch's schedulers look at to see that a step came before them

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as torch's, after checking its parameters and hyper-parameters."""
        if isinstance(param_group, dict) and "params" in param_group:
            given = param_group["params"]
            if not isinstance(given, Tensor | set):
                param_group["params"] = given = list(given)
            index = len(self.param_groups)
            for position, item in enumerate([given] if isinstance(given, Tensor) else given):
                name, parameter = item if isinstance(item, tuple) else (None, item)
                if isinstance(parameter, Tensor):
                    label = name or f"Parameter {position} of group {index}"
                    check_parameter(parameter, label, whole=not (self.elementwise or self.steps_dtensors))
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. In any precision moments, and narrow parameters' "master", are float32."""
        saved = super().state_dict()
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            for parameter, index in zip(group["params"], packed["params"], strict=True):
                if index in saved["state"] and not (form := self.form_of(parameter, group)).is_plain:
                    state, names = saved["state"][index], self.moment_names(group)
                    saved["state"][index] = distributed.exported_state(
                        parameter, state, form, names, self.name_of
                    )
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads our own or torch's state; with adopted arenas the values are copied into them.

        When both sides have parameter names, they are matched by name, in whatever order and groups. State
        that was saved under another `master` or `moments` is converted at the next step.
        """
        state_dict = matched_by_name(self, state_dict)
        for group in state_dict["param_groups"]:
            self._check_group({**self.defaults, **group})
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        restore_wide(self, state_dict)
        if self._adopted:
            params = self._parameters()
            ensure_state(self, params, [position for position, p in enumerate(params) if self.state.get(p)])

    # ---- precision

    def form_of(self, parameter: Tensor, group: Group) -> Form:
        """How this parameter of `group` and its state are stored."""
        names = self.moment_names(group)
        return form_of(parameter, group, tuple(self.moment_kinds.get(name, "exact") for name in names))

    def _check_group(self, group: Group) -> None:
        check_precision(group)
        self.check_group(group)

    # ---- beyond torch

    def adopt(self, params: FlatArena, grads: FlatArena) -> None:
        """Tells that parameters are views of `params` and gradients of `grads`; call it before stepping.

        Moments move to arenas of the same layout, and neighbouring slots become one segment. A slot's name is
        its parameter's name; nameless parameters are found by address. Slots of nobody here are left alone.
        Parameters in bf16 and fp16 arenas are stepped where they are, each by itself.
        """
        if params.data.dtype != torch.float32:
            return
        arena = AdoptedArena(params, grads)
        arena.claim(self._parameters(), self._names())
        self._adopted = (*self._adopted, arena)
        self._plan = None

    @torch._disable_dynamo
    @torch.no_grad()
    def sum_of_squares(self) -> Tensor:
        """The sum of squares of all present gradients, a float64 tensor without dimensions.

        Same bits for any number of threads, and for loose parameters and arenas. Inf and nan propagate, so
        `isfinite` of it tests all gradients at once. With DTensor parameters it is the sum over all shards on
        every rank, and a collective.
        """
        total = sum_over_gradients([group["params"] for group in self.param_groups])
        return distributed.sum_of_squares(self._parameters(), self.name_of) if total is None else total

    # ---- the step

    @torch._disable_dynamo  # a compiled training step breaks here: addresses are read anew at every step
    @torch.no_grad()
    def _advance(self, grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool = False) -> None:
        if not isinstance(skip, Tensor) or skip.device.type == "cpu":
            if bool(skip):
                return
            skip = False
        if self._plan is None or not self._plan.repeat(self, grad_scale, skip, zero_grad):
            self.step_on([parameter.grad for parameter in self._parameters()], grad_scale, skip, zero_grad)

    @torch.no_grad()
    def step_on(
        self,
        grads: list[Tensor | None],
        grad_scale: float | Tensor,
        skip: bool | Tensor,
        zero_grad: bool = False,
    ) -> None:
        """The step on gradients that need not be the parameters' own, one for each or None."""
        params = self._parameters()
        missing = [grad is None for grad in grads]
        plan = self._plan
        if plan is None or not plan.is_current(self, params, missing):
            present = [parameter for parameter, gone in zip(params, missing, strict=True) if not gone]
            self._announce([parameter for parameter in present if not is_native(parameter.device)])
            plan = self._plan = StepPlan(self, params, missing)
        plan.run(self, [grad for grad in grads if grad is not None], grad_scale, skip, zero_grad)

    def _announce(self, strangers: Iterable[Tensor]) -> None:
        """Warns once of parameters on devices without kernels."""
        devices = {parameter.device for parameter in strangers}
        if devices and not self._announced:
            warnings.warn(
                f"{type(self).__name__} has no native kernels for {', '.join(map(str, devices))} in "
                "this build: torch's own implementation steps those parameters.",
                stacklevel=6,
            )
            self._announced = True

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _names(self) -> dict[Tensor, str]:
        return {
            parameter: name
            for group in self.param_groups
            for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name, or its place when it was given without one; for messages."""
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    names = group.get("param_names")
                    return names[position] if names else f"parameter {position} of group {number}"
        return "a parameter"


def _listed(params: Iterable[Any], optimizer: str) -> list[Any]:
    listed = list(params)
    groups = [group for group in listed if isinstance(group, dict)]
    for group in groups:
        if "params" in group and not isinstance(group["params"], Tensor | set):
            group["params"] = list(group["params"])
    if not listed or (len(groups) == len(listed) and all(_is_empty(group) for group in groups)):
        raise ConfigError(
            f"{optimizer}: optimizer without parameters.",
            "At least one parameter is expected.",
            "Pass model.parameters(), and check that some of them require gradients.",
        )
    return listed


def _is_empty(group: Group) -> bool:
    given = group.get("params", ())
    return not isinstance(given, Tensor) and len(given) == 0
