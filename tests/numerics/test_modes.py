from __future__ import annotations

import pytest
import torch

from mlsys_engine.numerics import numerics_mode


@pytest.mark.parametrize(("before", "warn_only"), [(False, False), (True, True), (True, False)])
def test_reproducible_asks_for_deterministic_algorithms_and_puts_the_setting_back(before, warn_only):
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    try:
        with pytest.raises(KeyError), numerics_mode("reproducible"):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_fast_changes_nothing():
    with numerics_mode("fast"):
        assert not torch.are_deterministic_algorithms_enabled()
