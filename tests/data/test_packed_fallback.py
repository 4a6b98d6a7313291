"""What packed rows cannot do is done by the stock code, correctly, and said once."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from transitions import assert_same, numbered, packed, stock

from fp8rl_torchrl.data.packed import PackedReplayBuffer, PackedStorage


def images(*numbers):
    pixels = torch.tensor(numbers, dtype=torch.uint8)[:, None, None].expand(-1, 3, 3).clone()
    return TensorDict(number=torch.tensor(numbers), pixels=pixels, batch_size=len(numbers))


def batched(*numbers):
    return TensorDict(number=torch.tensor(numbers)[:, None].expand(-1, 2).clone(), batch_size=(len(numbers), 2))


def learned(*numbers):
    return TensorDict(number=torch.tensor(numbers).float().requires_grad_(), batch_size=len(numbers))


@pytest.mark.parametrize(
    ("data", "options", "told"),
    [
        (images, {}, "'pixels' is an image"),
        (batched, {}, "batch dimensions of its own"),
        (learned, {}, "'number' requires a gradient"),
        (numbered, {"storage": LazyTensorStorage}, "the storage is a LazyTensorStorage"),
        (numbered, {"prefetch": lambda _: 2}, "prefetch"),
        (numbered, {"collate_fn": lambda _: lambda data: data}, "there is a collate_fn"),
        (numbered, {"transform": lambda _: lambda data: data.set("twice", data["number"] * 2)}, "there are transforms"),
    ],
)
def test_what_rows_cannot_do_is_done_by_the_stock_code_and_said_once(data, options, told):
    made = [{name: make(10) for name, make in options.items()} for _ in range(2)]
    reference = TensorDictReplayBuffer(**{"storage": LazyTensorStorage(10), "batch_size": 4} | made[0])
    buffer = PackedReplayBuffer(**{"storage": PackedStorage(10), "batch_size": 4} | made[1])
    for either in (reference, buffer):
        either.extend(data(*range(6)))
        either.extend(data(*range(6, 12)))
    drawn = []
    for either in (reference, buffer):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn.append([either.sample(), *(either.sample_many(2) if either is buffer else [either.sample()] * 2)])
    said = [warning for warning in caught if told in str(warning.message)]
    assert len(said) == 1
    assert said[0].category is UserWarning
    assert said[0].filename == __file__, "it points at the line that sampled"
    if not options.get("prefetch"):  # two threads draw in an order of their own
        assert_same(*(batches[0] for batches in drawn))
    assert set(drawn[1][2].keys()) == set(drawn[0][0].keys())


def test_a_prioritized_sampler_works_on_packed_rows():
    from torchrl.data.replay_buffers.samplers import PrioritizedSampler

    try:
        sampler = PrioritizedSampler(10, alpha=1.0, beta=1.0)
    except Exception as error:  # TorchRL's extension does not load with every torch
        pytest.skip(f"no prioritized sampler here: {error}")
    buffer = packed(10, 100, sampler=sampler)
    buffer.extend(numbered(*range(10)))
    buffer.update_priority(torch.arange(10), torch.tensor([0.0] * 9 + [1.0]) + 1e-9)
    with pytest.warns(UserWarning, match="the sampler is a PrioritizedSampler"):
        batch = buffer.sample()
    assert batch["number"].tolist() == [9] * 100


def test_a_transform_that_is_appended_later_is_applied():
    buffer = packed()
    buffer.extend(numbered(*range(4)))
    assert "twice" not in buffer.sample().keys()
    buffer.append_transform(lambda data: data.set("twice", data["number"] * 2))
    with pytest.warns(UserWarning, match="there are transforms"):
        batch = buffer.sample()
    assert torch.equal(batch["twice"], batch["number"] * 2)


def test_data_that_differ_from_the_first_are_stored_as_the_stock_buffer_stores_them():
    reference, buffer = stock(), packed()
    for either in (reference, buffer):
        either.extend(numbered(0, 1, 2))
        either.extend(numbered(3, 4).set("new", torch.tensor([30.0, 40.0])))
        either.extend(numbered(5).exclude("odd"))
        either.add(numbered(6)[0].set("number", torch.tensor(6, dtype=torch.int32)))
    assert_same(reference[3:5], buffer[3:5])
    assert_same(reference[:5].exclude("new"), buffer[:5].exclude("new"))
    assert_same(reference[5:].exclude("new", "odd"), buffer[5:].exclude("new", "odd"))  # one was never written
    with pytest.warns(UserWarning, match="'new' was not in the first transition"):
        assert "new" in buffer.sample().keys()


def test_shapes_that_do_not_fit_are_refused_as_by_the_stock_buffer():
    for buffer in (stock(), packed()):
        buffer.extend(numbered(0, 1))
        with pytest.raises(RuntimeError):
            buffer.extend(numbered(2, 3).set("number", torch.zeros(2, 7, dtype=torch.int64)))
