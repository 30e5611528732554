"""What an optimizer is given that cannot work is refused where it is given, in three parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import AdamW
from mlsys_engine.optim.checks import TORCH_SWITCHES, check_max_grad_norm


@pytest.mark.parametrize("switch", sorted(TORCH_SWITCHES))
def test_a_switch_between_torchs_implementations_is_refused_with_what_to_do(switch: str) -> None:
    options: dict[str, Any] = {switch: True}
    with pytest.raises(ConfigError, match=rf"AdamW\({switch}=.*one implementation.*Leave {switch} out"):
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


def test_a_mistyped_keyword_is_pythons_own_error() -> None:
    options: dict[str, Any] = {"moment": "int8"}
    with pytest.raises(TypeError, match=r"AdamW\(\) got an unexpected keyword argument 'moment'"):
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1"}, r"lr='0\.1' was given\. A number is expected"),
        ({"betas": 0.9}, r"betas=0\.9 was given\. Two numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas=\(0\.9, 0\.99, 0\.999\) was given\. Two numbers"),
        ({"betas": (None, 0.9)}, r"betas\[0\]=None was given\. A number"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1 was given.*below 1"),
        ({"ema": "0.9"}, r"ema='0\.9' was given"),
        ({"seed": 0.5}, r"seed=0\.5 was given\. A whole number"),
    ],
)
def test_values_of_another_kind_are_refused_when_the_optimizer_is_built(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_to_is_positive(norm: float) -> None:
    check_max_grad_norm(None)
    check_max_grad_norm(1e-3)
    with pytest.raises(ConfigError, match="positive norm, or None"):
        check_max_grad_norm(norm)
