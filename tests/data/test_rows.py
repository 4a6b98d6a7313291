"""`RowLayout`: every dtype and shape comes back bit for bit, aligned, in as many words as it needs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict
from transitions import DTYPES, assert_same, numbered, raw

from fp8rl_torchrl.data.rows import RowLayout, why_no_rows

CPU = torch.device("cpu")


def with_index(data):
    return data.set("index", torch.arange(len(data)))


def random_bits(dtype, shape, seed):
    """All bit patterns, with NaNs of every payload; for bool, its two."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(
    fields=st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES, st.integers(0, 3)), max_size=8),
    count=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_every_dtype_and_shape_comes_back_bit_for_bit(fields, count, seed):
    data = with_index(TensorDict(batch_size=count))
    for place, (dtype, shape, depth) in enumerate(fields):
        if not (dtype == torch.uint8 and len(shape) >= 2):
            data.set((*"abc"[:depth], f"x{place}"), random_bits(dtype, (count, *shape), seed + place))
    element = data[0].to("cpu")
    assert why_no_rows(element) is None
    layout = RowLayout(element, CPU)
    rows = layout.pack(data)
    assert (rows.dtype, tuple(rows.shape)) == (torch.int64, (count, layout.words))
    used = sum(raw(value).numel() for value in data.values(True, True)) // count
    assert layout.words == -(-used // 8)
    assert_same(layout.view(rows), data.to("cpu"))
    assert_same(layout.batch(rows.clone(), data["index"]), data.to("cpu"))
    twice = layout.batches(rows.repeat(2, 1), data["index"].repeat(2), 2)
    for batch in twice:
        assert_same(batch, data.to("cpu"))


def test_payloads_and_signs_survive():
    bits = torch.tensor([0x7FC12345, 0x7F800001, -0x80000000], dtype=torch.int64).to(torch.int32)
    data = with_index(TensorDict(x=bits.view(torch.float32), batch_size=3))
    layout = RowLayout(data[0], CPU)
    back = layout.view(layout.pack(data))["x"]
    assert back.isnan().tolist() == [True, True, False]
    assert back[2] == 0
    assert back[2].signbit()
    assert torch.equal(back.view(torch.int32), bits)
    # Packing by value would not do: through float64 and back, a signalling NaN becomes a quiet one.
    assert not torch.equal(data["x"].double().float().view(torch.int32), bits)


def test_a_row_by_hand():
    data = TensorDict(flag=torch.tensor([True]), x=torch.tensor([[1.0, -0.0]]), index=torch.tensor([7]), batch_size=1)
    rows = RowLayout(data[0], CPU).pack(data)
    # index | x: 1.0 is 3F800000 and -0.0 is 80000000, the first in the low half (little endian) | flag and padding
    assert rows.shape == (1, 3)
    assert rows[0, 0] == 7
    assert rows[0, 1] == -0x80000000_00000000 + 0x3F800000
    assert rows[0, 2] & 0xFF == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data, None),
        (lambda data: data.exclude("odd"), "'odd' is not what it was"),
        (lambda data: data.set("new", torch.zeros(2)), "'new' was not in the first"),
        (lambda data: data.set(("next", "new"), torch.zeros(2)), "'next.new' was not in the first"),
        (lambda data: data.set("odd", torch.zeros(2)), "'odd' is not what it was"),
        (lambda data: data.set("number", torch.zeros(2, 1, dtype=torch.int64)), "'number' is not what it was"),
        (lambda data: data.set(("next", "square"), torch.zeros(2, 3, requires_grad=True)), "requires a gradient"),
    ],
)
def test_what_differs_from_the_first_transition_is_told(change, told):
    layout = RowLayout(with_index(numbered(1))[0], CPU)
    difference = layout.difference(change(with_index(numbered(1, 2))))
    assert difference is None if told is None else told in difference


@pytest.mark.parametrize(
    ("element", "told"),
    [
        (torch.zeros(3), "a Tensor"),
        (TensorDict(index=torch.zeros(2), batch_size=2), "batch dimensions of its own ([2])"),
        (TensorDict(x=torch.zeros(2)), "without their index"),
        (TensorDict(index=0, text=NonTensorData("hello")), "'text' is not a dense tensor"),
        (TensorDict(index=0, x=torch.zeros(2).to_sparse()), "'x' is not a dense tensor"),
        (TensorDict(index=0, x=torch.zeros(2, dtype=torch.complex64)), "'x' is torch.complex64"),
        (TensorDict(index=0, next={"pixels": torch.zeros(4, 4, 3, dtype=torch.uint8)}), "'next.pixels' is an image"),
        (TensorDict(index=0, x=torch.zeros(2, requires_grad=True)), "'x' requires a gradient"),
    ],
)
def test_what_rows_cannot_hold(element, told):
    assert told in why_no_rows(element)
