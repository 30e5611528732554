"""FSDP2 allocates from native groups whether it was imported before the first group or after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Runs in a fresh interpreter: the parent of the tests has long imported FSDP2.
_PROBE = """
import sys
{early}
from mlsys_engine.comm.torch_buckets import put_buckets_into_the_arena
finders = list(sys.meta_path)
put_buckets_into_the_arena()
put_buckets_into_the_arena()
assert ("torch.distributed.fsdp" in sys.modules) is {imported}
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
assert hasattr(FSDPParamGroup.__init__, "__wrapped__")
assert not hasattr(FSDPParamGroup.__init__.__wrapped__, "__wrapped__"), "wrapped twice"
assert sys.meta_path == finders, sys.meta_path
"""


@pytest.mark.parametrize("early", [True, False])
def test_parameter_groups_are_adapted_whenever_fsdp2_is_imported(early: bool) -> None:
    code = _PROBE.format(early="import torch.distributed.fsdp" if early else "", imported=early)
    subprocess.run([sys.executable, "-c", code], check=True)
