"""Transitions of every kind for the tests of packed rows, and how to compare them bit for bit."""

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from fp8rl_torchrl.data.packed import PackedReplayBuffer, PackedStorage

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def numbered(*numbers):
    """Transitions that can be told apart, with nested keys and items of 8, 4, 2 and 1 bytes."""
    number = torch.tensor(numbers)
    return TensorDict(
        number=number,
        odd=number % 2 == 1,
        next=TensorDict(
            square=(number**2).float()[:, None] * torch.ones(3),
            deep=TensorDict(half=(number / 2).half()[:, None, None].expand(-1, 2, 2).clone(), batch_size=len(numbers)),
            batch_size=len(numbers),
        ),
        batch_size=len(numbers),
    )


def packed(capacity=10, batch_size=4, **options):
    return PackedReplayBuffer(storage=PackedStorage(capacity), batch_size=batch_size, **options)


def stock(capacity=10, batch_size=4, **options):
    return TensorDictReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=batch_size, **options)


def raw(tensor):
    """The bytes of a tensor."""
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_same(left, right, *, ordered=True):
    """Two TensorDicts are equal: keys, batch sizes, dtypes, shapes, and every bit; in order, and on the same device.

    What the stock buffer restores has its keys in another order, and (from a state) no device: not ``ordered``.
    """
    assert type(left) is type(right)
    assert left.batch_size == right.batch_size
    assert left.device == right.device or not ordered
    assert (list if ordered else set)(left.keys()) == (list if ordered else set)(right.keys())
    for key, value in left.items():
        other = right.get(key)
        if isinstance(value, TensorDict):
            assert_same(value, other, ordered=ordered)
        else:
            assert (value.dtype, value.shape, value.device) == (other.dtype, other.shape, other.device), key
            assert torch.equal(raw(value), raw(other)), key
