"""Saving a packed buffer: it goes on exactly where it was, and its files are those of the stock buffer."""

import copy
import io

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from transitions import assert_same, numbered, packed, stock


def by_files(source, target, folder):
    source.dumps(folder / "buffer")
    target.loads(folder / "buffer")


def by_state(source, target, folder):
    target.load_state_dict(copy.deepcopy(source.state_dict()))


def by_state_file(source, target, folder):
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    target.load_state_dict(torch.load(stream, weights_only=False))


def by_checkpoint(source, target, folder):
    Checkpoint(replay=source).save(folder / "checkpoint")
    Checkpoint(replay=target).load(folder / "checkpoint")


WAYS = [by_files, by_state, by_state_file, by_checkpoint]


def filled(make, count, **options):
    buffer = make(10, 3, **options)
    for start in range(count):
        buffer.extend(numbered(start, start + 100))
    return buffer


def assert_go_on_alike(left, right):
    """The same contents now, and after the same further steps, and the same draws."""
    drawn = []
    for buffer in (left, right):
        torch.manual_seed(1)
        drawn.append([buffer.sample(), buffer.extend(numbered(50, 51, 52)), buffer.sample(), buffer[:].clone()])
    assert_same(drawn[0][0], drawn[1][0], ordered=False)
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert_same(drawn[0][2], drawn[1][2], ordered=False)
    assert_same(drawn[0][3], drawn[1][3], ordered=False)
    assert len(left) == len(right)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [2, 8])  # not full; full, with the oldest overwritten
@pytest.mark.parametrize("other", [0, 3])  # into a new buffer; into one that holds other transitions
def test_a_restored_buffer_goes_on(way, count, other, tmp_path):
    buffer, restored = filled(packed, count), filled(packed, other)
    way(buffer, restored, tmp_path)
    assert restored.storage.rows is not None
    assert restored.storage.rows.data_ptr() != buffer.storage.rows.data_ptr()
    assert_go_on_alike(buffer, restored)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("source", "target"), [(stock, packed), (packed, stock)])
@pytest.mark.parametrize("count", [2, 8])
def test_each_loads_what_the_other_saved(way, source, target, count, tmp_path):
    buffer, restored = filled(source, count), target(10, 3)
    way(buffer, restored, tmp_path)
    assert (getattr(restored.storage, "rows", None) is not None) == (target is packed)
    assert_go_on_alike(buffer, restored)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_pass_goes_on(way, tmp_path):
    """10 transitions by 3: what is left of the pass comes first, then a new one begins."""
    torch.manual_seed(0)
    buffer = filled(packed, 5, sampler=SamplerWithoutReplacement())
    drawn = [batch["index"] for batch in [buffer.sample(), *buffer.sample_many(1)]]
    restored = packed(10, 3, sampler=SamplerWithoutReplacement())
    way(buffer, restored, tmp_path)
    rest = [[batch["index"] for batch in either.sample_many(2)] for either in (buffer, restored)]
    for left, right in zip(*rest, strict=True):
        assert torch.equal(left, right)
    assert sorted(torch.cat([*drawn, *rest[1]]).tolist()) == list(range(10))
    fresh = filled(packed, 5, sampler=SamplerWithoutReplacement()).sample_many(2)
    assert sorted(torch.cat([*drawn, *(batch["index"] for batch in fresh)]).tolist()) != list(range(10))


def test_a_buffer_that_holds_nothing_can_be_restored_from_its_state():
    buffer, restored = packed(), packed()
    restored.load_state_dict(buffer.state_dict())
    assert len(restored) == 0
    restored.extend(numbered(1, 2))
    assert restored.storage.rows is not None
    assert set(restored.sample()["number"].tolist()) <= {1, 2}


@pytest.mark.parametrize("way", WAYS)
def test_what_rows_cannot_hold_is_restored_too(way, tmp_path):
    pixels = torch.arange(36, dtype=torch.uint8).reshape(4, 3, 3)
    buffer, restored = packed(), packed()
    buffer.extend(TensorDict(pixels=pixels, batch_size=4))
    way(buffer, restored, tmp_path)
    assert torch.equal(restored[:]["pixels"], pixels)
    with pytest.warns(UserWarning, match="'pixels' is an image"):
        batch = restored.sample()
    assert torch.equal(batch["pixels"], pixels[batch["index"]])
