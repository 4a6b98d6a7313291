"""`PackedReplayBuffer` does what `TensorDictReplayBuffer` does: the same batches for the same seed, in own memory."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from transitions import assert_same, numbered, packed, stock

from fp8rl_torchrl.data.packed import PackedReplayBuffer, PackedStorage
from fp8rl_torchrl.data.rows import RowLayout

batch, pack = RowLayout.batch, RowLayout.pack
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(1, 25)),
        st.tuples(st.just("add"), st.just(1)),
        st.tuples(st.just("sample"), st.just(4)),
        st.tuples(st.just("many"), st.integers(1, 5)),
        st.tuples(st.just("empty"), st.just(0)),
        st.tuples(st.just("load"), st.just(0)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("pickle"), st.just(0)),
        st.tuples(st.just("set"), st.just(0)),
    ),
    max_size=12,
)


def apply(buffer, operation, number, start):
    """Do one thing to a buffer; what it returned, and the buffer to go on with."""
    returned = None
    if operation == "extend":
        returned = buffer.extend(numbered(*range(start, start + number)))
    elif operation == "add":
        returned = buffer.add(numbered(start)[0])
    elif operation == "empty":
        buffer.empty()
    elif operation == "copy":
        buffer = copy.deepcopy(buffer)
    elif operation == "pickle":
        buffer = pickle.loads(pickle.dumps(buffer))
    elif operation == "set" and len(buffer) > 2:
        buffer[1] = numbered(start)[0].set("index", torch.tensor(5))
        buffer[0:2] = numbered(start, start + 1).set("index", torch.tensor([8, 9]))
    elif operation == "sample" and len(buffer):
        returned = buffer.sample()
    elif operation == "many" and len(buffer):
        many = getattr(buffer, "sample_many", lambda count: [buffer.sample() for _ in range(count)])
        returned = many(number)
    elif operation == "load":
        state = copy.deepcopy(buffer.state_dict())
        if buffer.storage.initialized:
            buffer.extend(numbered(98, 99))
        buffer.load_state_dict(state)
    return returned, buffer


def compare(operations, seed, replacement):
    """Do the same things to a stock and to a packed buffer, and compare all that can be seen of them."""
    buffers, start = [], 0
    for make in (stock, packed):
        buffers.append(make() if replacement else make(sampler=SamplerWithoutReplacement()))
    for operation, number in operations:
        results = []
        for place, buffer in enumerate(buffers):
            torch.manual_seed(seed)
            result, buffers[place] = apply(buffer, operation, number, start)
            results.append(result)
        start += number
        expected, found = (result if isinstance(result, list) else [result] for result in results)
        assert len(expected) == len(found)
        for left, right in zip(expected, found, strict=True):
            if isinstance(left, TensorDict):
                assert_same(left, right)
            else:
                assert type(left) is type(right)
                assert torch.equal(torch.as_tensor(left), torch.as_tensor(right)) if left is not None else True
        reference, tested = buffers
        assert len(reference) == len(tested)
        assert reference.writer._cursor == tested.writer._cursor
        assert reference.write_count == tested.write_count
        if len(reference):
            assert_same(reference[:], tested[:])
            assert tested.storage.rows is not None


@settings(deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 3), replacement=st.booleans())
def test_it_does_what_the_stock_buffer_does(operations, seed, replacement):
    compare(operations, seed, replacement)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("batch", lambda self, rows, index: batch(self, rows.flip(0), index)),
        ("pack", lambda self, data: pack(self, data).bitwise_xor(1 << 8)),
    ],
)
def test_the_comparison_sees_a_wrong_order_and_a_wrong_bit(name, broken, monkeypatch):
    monkeypatch.setattr(RowLayout, name, broken)
    with pytest.raises(AssertionError):
        compare([("extend", 7), ("sample", 4)], 0, True)


def test_a_batch_is_gathered_from_rows_and_not_by_the_stock_code(monkeypatch):
    buffer = packed()
    buffer.extend(numbered(*range(10)))

    def refuse(*_):
        raise AssertionError("the stock code drew a batch")

    monkeypatch.setattr(TensorDictReplayBuffer, "_sample", refuse)
    assert buffer.sample(4).batch_size == (4,)
    assert len(buffer.sample_many(3)) == 3
    buffer.append_transform(lambda data: data)
    with pytest.warns(UserWarning, match="transforms"), pytest.raises(AssertionError, match="the stock code"):
        buffer.sample()


def test_the_draws_are_those_of_the_stock_buffer():
    """The drawn places, by the formula: one `torch.randint` a batch, from the global stream or a generator's."""
    for generator in (None, torch.Generator().manual_seed(3)):
        buffer = packed(50, 16, generator=generator)
        buffer.extend(numbered(*range(30)))
        torch.manual_seed(3)
        found = [buffer.sample()["index"], *(batch["index"] for batch in buffer.sample_many(2))]
        torch.manual_seed(3)
        again = None if generator is None else torch.Generator().manual_seed(3)
        for index in found:
            assert torch.equal(index, torch.randint(0, 30, (16,), generator=again))


def test_samples_are_uniform():
    torch.manual_seed(0)
    buffer = packed(50, 100)
    buffer.extend(numbered(*range(50)))
    drawn = torch.cat([batch["number"] for batch in buffer.sample_many(200)])
    counts = torch.bincount(drawn, minlength=50)
    # 20,000 draws over 50: 400 each; the chi-square statistic of 49 degrees of freedom exceeds 85.4 once in 1,000.
    assert ((counts - 400.0) ** 2 / 400).sum() < 85.4
    lopsided = torch.bincount(drawn.clamp(min=1), minlength=50)  # the first is never drawn, the second twice as often
    assert ((lopsided - 400.0) ** 2 / 400).sum() > 85.4


# --- passes without replacement ---


@pytest.mark.parametrize("batch_size", [3, 5, 20])
def test_passes_draw_every_transition_once(batch_size):
    """20 transitions; by 3, the last batch of a pass has 2."""
    torch.manual_seed(0)
    buffer = packed(20, batch_size, sampler=SamplerWithoutReplacement())
    buffer.extend(numbered(*range(20)))
    pass_length = -(-20 // batch_size)
    batches = [buffer.sample(), *buffer.sample_many(3 * pass_length - 2), buffer.sample()]
    sizes = [min(batch_size, 20 - start) for start in range(0, 20, batch_size)] * 3
    assert [len(batch) for batch in batches] == sizes
    drawn = torch.cat([batch["number"] for batch in batches]).reshape(3, 20)
    for order in drawn:
        assert sorted(order.tolist()) == list(range(20))
    assert len({tuple(order.tolist()) for order in drawn}) == 3, "each pass has an order of its own"


def test_iterating_is_one_pass():
    buffer = packed(20, 5, sampler=SamplerWithoutReplacement())
    buffer.extend(numbered(*range(20)))
    for _ in range(2):
        assert sorted(torch.cat([batch["number"] for batch in buffer]).tolist()) == list(range(20))


@pytest.mark.parametrize("size", [0, -1, 1.5, "100", True])
def test_a_storage_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match=f"max_size must be an integer >= 1; got {size!r}"):
        PackedStorage(size)


def test_what_cannot_be_drawn_is_refused():
    buffer = packed()
    for draw in (buffer.sample, lambda: buffer.sample_many(2)):
        with pytest.raises(RuntimeError, match="empty storage"):
            draw()
    buffer.extend(numbered(0, 1))
    for count in (0, 2.5, "3", True):
        with pytest.raises(ValueError, match=f"count must be an integer >= 1; got {count!r}"):
            buffer.sample_many(count)
    unsized = PackedReplayBuffer(storage=PackedStorage(10))
    unsized.extend(numbered(0, 1))
    with pytest.raises(RuntimeError, match="batch_size not specified"):
        unsized.sample_many(2)
    assert len(unsized.sample_many(2, 3)[1]) == 3


def test_another_batch_size_is_told_once_as_by_the_stock_buffer():
    buffer = packed()
    buffer.extend(numbered(0, 1))
    with pytest.warns(UserWarning, match="conflicting batch_sizes"):
        assert len(buffer.sample(3)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(buffer.sample(3)) == 3
        assert [len(batch) for batch in buffer.sample_many(2, 5)] == [5, 5]


def test_the_info_of_a_sample():
    buffer = packed()
    buffer.extend(numbered(*range(10)))
    batch, info = buffer.sample(return_info=True)
    assert torch.equal(batch["index"], info["index"])
