from __future__ import annotations

import torch
from torch import nn

from mlsys_engine.data_parallel.buffers import BufferSync


class Counter(nn.Module):
    """A buffer that changes, one that does not, a derived one, and running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)  # has no counter that would tell
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("derived", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)


class FromRankZero:
    """A broadcast on a rank that is not 0: rank 0 holds sevens."""

    def __init__(self):
        self.sizes = []

    def __call__(self, flat):
        self.sizes.append(flat.numel())
        flat.fill_(7)
        return self

    def wait(self):
        pass


def test_running_statistics_are_sent_after_every_step():
    model, broadcast = Counter(), FromRankZero()
    sync = BufferSync(model, broadcast)
    sync.start()
    sync.finish([False, False])
    # The two running statistics in one message, the integer counter of batches in another.
    assert broadcast.sizes == [4, 1]
    assert model.norm.running_mean.tolist() == [7, 7] and model.norm.num_batches_tracked == 7
    assert not model.calls.any() and not model.derived.any()


def test_other_buffers_are_sent_after_some_rank_changed_them():
    model, broadcast = Counter(), FromRankZero()
    sync = BufferSync(model, broadcast)
    assert sync.num_watched == 2 and sync.changed() == [False, False]
    model.calls += 1
    assert sync.changed() == [True, False]
    sync.finish([True, False])
    assert model.calls.tolist() == [7] and broadcast.sizes == [1]
    assert sync.changed() == [False, False]
    sync.finish([False, True])  # another rank's news
    assert broadcast.sizes == [1, 3] and model.mask.all()


def test_a_buffer_that_was_replaced_by_a_new_tensor_has_changed():
    model = Counter()
    sync = BufferSync(model, FromRankZero())
    model.calls = torch.zeros(1)
    assert sync.changed() == [True, False]


def test_a_world_of_one_watches_nothing():
    sync = BufferSync(Counter(), None)
    assert sync.num_watched == 0 and sync.changed() == []
    sync.start()
    sync.finish([])
