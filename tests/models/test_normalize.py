"""Running statistics and the layer that normalises by them: their numbers."""

import numpy as np
import pytest
import torch
from actor_critics import batch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fp8rl_torchrl.models.normalize import Normalize, RunningStatistics

# --- the numbers ---


def test_two_batches_by_hand():
    statistics = RunningStatistics(2)
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([0, 0], [1, 1], 0)
    statistics.update(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([2, 10], [1, 0], 2)
    # 1, 3, 5, 7: mean 4, squares 9 + 1 + 1 + 9; 10, 10, 10, 50: mean 20, squares 3 * 100 + 900.
    statistics.update(torch.tensor([[[5.0, 10.0]], [[7.0, 50.0]]]))
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([4, 20], [5, 300], 4)


def assert_those_of(statistics, data):
    """The statistics are those that numpy finds in all data at once, ``[n, size]``, up to the rounding of float64."""
    exact = data.astype(np.float64)
    scale = np.abs(exact).max(initial=1)
    assert statistics.count.item() == len(data)
    np.testing.assert_allclose(statistics.mean.numpy(), exact.mean(0), rtol=0, atol=1e-14 * scale)
    spread = exact.std(0).max()
    # Each merge rounds the mean to 1e-16 of its size; the variance sees that difference times the spread.
    bound = 1e-12 * spread**2 + 1e-14 * scale * spread + 1e-28 * scale**2
    np.testing.assert_allclose(statistics.variance.numpy(), exact.var(0), rtol=0, atol=bound)


def shown(statistics, data, cuts):
    """The statistics after an update by each of the pieces of the data."""
    for piece in np.split(data, sorted(cuts)):
        statistics.update(torch.from_numpy(piece))
    return statistics


@settings(max_examples=100, deadline=None)
@given(
    data=st.tuples(st.integers(1, 40), st.integers(1, 3)).flatmap(
        lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32))
    ),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
@example(data=np.array([[1.0]], np.float32), offset=0.0, cuts=[0, 0, 1])
def test_any_batching_gives_the_statistics_of_all_data(data, offset, cuts):
    data = data + np.float32(offset)
    assert_those_of(shown(RunningStatistics(data.shape[1]), data, cuts), data)


def far_from_zero():
    return (1e6 + np.random.default_rng(0).normal(size=(4000, 2))).astype(np.float32)


class SumsOfSquares(RunningStatistics):
    """The textbook formula E[x²] - E[x]², which loses the digits of a spread that is small beside the mean."""

    def update(self, observations):
        seen, new = self.count.clone(), observations.double()
        squares = (self.variance + self.mean**2) * seen + new.square().sum(0)
        self.mean.copy_((self.mean * seen + new.sum(0)) / (seen + len(new)))
        self.count.add_(len(new))
        self.variance.copy_(squares / self.count - self.mean**2)


def test_statistics_far_from_zero_keep_their_digits():
    data, cuts = far_from_zero(), range(0, 4000, 7)
    assert_those_of(shown(RunningStatistics(2), data, cuts), data)
    for worse in (SumsOfSquares(2), RunningStatistics(2).float()):
        with pytest.raises(AssertionError):
            assert_those_of(shown(worse, data, cuts), data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_is_left_out(bad):
    statistics, expected = RunningStatistics(2), RunningStatistics(2)
    usable = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    broken = torch.tensor([[100.0, 200.0], [300.0, bad]])
    statistics.update(broken)
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([0, 0], [1, 1], 0)
    for each in (usable, broken, usable + 1):
        statistics.update(each)
    for each in (usable, usable + 1):
        expected.update(each)
    for key, value in expected.state_dict().items():
        assert torch.equal(statistics.state_dict()[key], value), key


def test_no_observations_change_nothing():
    statistics = RunningStatistics(2)
    statistics.update(torch.empty(0, 2))
    statistics.update(torch.tensor([1.0, 2.0]))  # a single one
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([1, 2], [0, 0], 1)


@pytest.mark.parametrize("shape", [(5, 4), (4,), (5, 2, 1), ()])
def test_observations_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"statistics of observations \[\.\.\., 2\]; got \["):
        RunningStatistics(2).update(torch.zeros(shape))


# --- the layer ---


def test_normalised_by_hand():
    statistics = RunningStatistics(2)
    layer = Normalize(statistics, limit=2.0)
    observation = torch.tensor([[5.0, -1.5], [0.5, 100.0]])
    # Before the first update, nothing but the clipping.
    torch.testing.assert_close(layer(observation), torch.tensor([[2.0, -1.5], [0.5, 2.0]]))
    statistics.update(torch.tensor([[1.0, 0.0], [5.0, 20.0]]))  # means 3 and 10, standard deviations 2 and 10
    torch.testing.assert_close(layer(observation), torch.tensor([[1.0, -1.15], [-1.25, 2.0]]))
    assert layer(observation.expand(3, 2, 2)).shape == (3, 2, 2)


def test_a_component_that_never_changes_is_zero():
    statistics = RunningStatistics(1)
    for _ in range(3):
        statistics.update(torch.full((7, 1), 0.1))
    assert Normalize(statistics)(torch.full((2, 1), 0.1)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_computes_in_fp32_under_autocast(dtype):
    statistics = RunningStatistics(2)
    statistics.update(batch(50)["observation"] + 100)
    layer, observation = Normalize(statistics), batch(8)["observation"] + 100
    with torch.autocast("cpu", dtype=dtype):
        normalised = layer(observation)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised, layer(observation))


def test_print_shows_the_size_and_the_limit():
    assert repr(Normalize(RunningStatistics(3), 5.0)) == "Normalize(3, limit=5.0)"


def test_both_compile_in_one_piece():
    statistics, expected = RunningStatistics(2), RunningStatistics(2)
    update = torch.compile(statistics.update, backend="eager", fullgraph=True)
    forward = torch.compile(Normalize(statistics), backend="eager", fullgraph=True)
    for seed in range(3):  # what was compiled once sees every later update
        data = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        update(data)
        expected.update(data)
        assert torch.equal(forward(data), Normalize(expected)(data))
