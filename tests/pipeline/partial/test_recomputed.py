"""Parts of a forward whose blocks are recomputed in the backward."""

from __future__ import annotations

import torch

from mlsys_engine.activation.checkpointing import apply_actions
from tests.pipeline.partial.one_process import check_equal
from tests.pipeline.partial.test_stage_part import Skips, skips_batch


def test_recomputed_blocks_receive_once_and_give_the_same_bits() -> None:
    torch.manual_seed(0)
    model = Skips(0.2).double()
    apply_actions(model, {f"blocks.{position}": "recompute" for position in range(4)})
    check_equal(model, [skips_batch(4, 5), skips_batch(3, 7), skips_batch(4, 5)], 2)
