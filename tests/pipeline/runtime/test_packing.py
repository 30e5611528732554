from __future__ import annotations

import torch

from mlsys_engine.pipeline.runtime.packing import Layout, Message, layout_of, pack, unpack

CPU = torch.device("cpu")


def test_tensors_arrive_with_their_values_types_strides_and_need_of_a_gradient():
    tensors = (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_(),
        torch.randn(3, 1).expand(3, 4),
        torch.tensor(True),
        torch.empty(0, 7, dtype=torch.int64),
        torch.randn(5, dtype=torch.float64).to(torch.bfloat16),
    )
    state = torch.get_rng_state()
    layout = layout_of(tensors, state)
    assert Layout.decode(layout.encode()) == layout
    found = unpack(pack(Message(tensors, state), layout, CPU), layout)
    assert torch.equal(found.state, state)
    for given, tensor in zip(tensors, found.tensors, strict=True):
        assert torch.equal(tensor, given) and tensor.dtype is given.dtype
        assert tensor.requires_grad == given.requires_grad and tensor.is_leaf
    assert found.tensors[0].stride() == tensors[0].stride()


def test_a_gradient_that_is_not_there_arrives_as_none():
    layout = layout_of((torch.zeros(3), torch.zeros(2)))
    found = unpack(pack(Message((None, torch.ones(2))), layout, CPU), layout)
    assert found.tensors[0] is None and found.tensors[1].tolist() == [1, 1] and found.state is None


def test_a_message_of_nothing_has_a_byte():
    layout = layout_of(())
    assert layout.num_bytes == 1 and unpack(pack(Message(()), layout, CPU), layout).tensors == ()
