"""The memory of batches: no two share any, and none is the buffer's."""

import pytest
import torch
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from transitions import assert_same, numbered, packed


def memory(batch):
    """The addresses of all bytes of a batch."""
    return {
        value[place].data_ptr() + byte
        for value in batch.values(True, True)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in (*value.shape, 1))).reshape(-1, value.ndim + 1)
        for place in [tuple(place[:-1].tolist())]
        for byte in range(value.element_size())
    }


def share(batches):
    """Whether a byte belongs to two of them, or twice to one."""
    bytes_of = [memory(batch) for batch in batches]
    sizes = sum(value.numel() * value.element_size() for batch in batches for value in batch.values(True, True))
    return len(set().union(*bytes_of)) < sizes


@pytest.mark.parametrize("options", [{}, {"sampler": SamplerWithoutReplacement}])
def test_no_two_batches_share_memory(options):
    buffer = packed(8, 2, **{name: make() for name, make in options.items()})
    buffer.extend(numbered(*range(8)))
    batches = [buffer.sample(), *buffer.sample_many(3), buffer.sample()]
    assert not share([*batches, buffer[:]])
    assert share([*batches, batches[1][:1]])
    assert share([buffer[:], buffer[2:3]])


def test_writing_into_a_batch_changes_nothing_else():
    buffer = packed(8, 4)
    buffer.extend(numbered(*range(8)))
    batches = buffer.sample_many(3)
    before = [batch.clone() for batch in batches]
    stored = buffer[:].clone()
    for value in batches[1].values(True, True):
        value.zero_()
    assert_same(buffer[:], stored)
    for place in (0, 2):
        for key, value in before[place].items(True, True):
            assert torch.equal(batches[place][key], value)
    assert not batches[1]["next", "square"].any()
    assert batches[1]["index"].tolist() == [0] * 4
    # The comparison would have seen it: a slice of the buffer is a view of what is stored.
    buffer[:]["number"].zero_()
    with pytest.raises(AssertionError):
        assert_same(buffer[:], stored)


@pytest.mark.parametrize("many", [False, True])
def test_changing_one_key_does_not_forbid_the_backward_pass_through_another(many):
    buffer = packed(8, 4)
    buffer.extend(numbered(*range(8)))
    first, second = buffer.sample_many(2) if many else (buffer.sample(), buffer.sample())
    weight = torch.ones(3, requires_grad=True)
    loss = (first["next", "square"] * weight).sum()
    first["odd"].fill_(True)
    second["next", "square"].zero_()
    loss.backward()
    assert torch.equal(weight.grad, first["next", "square"].sum(0))
    # What is saved for the backward pass is guarded all the same.
    loss = (first["next", "square"] * weight).sum()
    first["next", "square"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_stored_is_a_copy():
    data = numbered(*range(4))
    buffer = packed()
    buffer.extend(data)
    data.zero_()
    assert buffer[:]["number"].tolist() == [0, 1, 2, 3]
