"""What changes in the course of a run: every schedule by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8rl_torchrl.recipes.schedules import epsilon_at, linear, lr_factor


def factors(kind, updates, final, done):
    return lr_factor(kind, updates, final)(torch.tensor(done)).tolist()


# -------------------------------------------------------------------------------------------------- learning rates


def test_linear_by_hand():
    # over four updates from 1 to 0.5: an eighth each time, and then it rests
    assert factors("linear", 4, 0.5, [0, 1, 2, 3, 4, 5, 1000]) == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5]
    assert factors("linear", 4, 0.0, [0, 1, 2, 3, 4, 5]) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert factors("linear", 1, 1.0, [0, 1, 2]) == [1.0, 1.0, 1.0]


@given(done=st.integers(0, 10**6), updates=st.integers(1, 10**6), final=st.floats(0, 1))
def test_linear_is_bit_identical_to_its_formula(done, updates, final):
    done = torch.tensor(done)
    expected = (1 - (1 - final) * done / updates).clamp(min=final)
    assert torch.equal(lr_factor("linear", updates, final)(done), expected)


def test_another_order_of_the_same_operations_has_other_bits():
    """Negative twin: rounding makes the formula's order visible, so a run that is resumed must keep it."""
    done = torch.arange(100)
    assert not torch.equal(lr_factor("linear", 300, 0.05)(done), 1 - (1 - 0.05) * (done / 300))


def test_cosine_by_hand():
    # final + (1 - final) (1 + cos(pi d / n)) / 2, at d/n = 0, 1/4, 1/3, 1/2, 2/3, 1, and beyond
    expected = [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.2 + 0.4 * 1.5, 0.6, 0.2 + 0.4 * 0.5, 0.2, 0.2, 0.2]
    assert factors("cosine", 12, 0.2, [0, 3, 4, 6, 8, 12, 13, 999]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@given(updates=st.integers(2, 1000), final=st.floats(0, 1))
def test_a_factor_falls_from_1_to_its_end_and_never_rises(kind, updates, final):
    values = lr_factor(kind, updates, final)(torch.arange(updates + 3)).double()
    assert values[0] == pytest.approx(1.0, abs=1e-6)
    assert values[updates:].tolist() == pytest.approx([final] * 3, abs=1e-6)
    assert (values.diff() <= 1e-6).all()


def test_constant_is_no_schedule():
    assert lr_factor("constant", 10, 0.5) is None


def test_a_factor_stays_on_the_device():
    """The count of updates is a tensor, and nothing here may read it."""
    done = torch.zeros((), dtype=torch.int64, device="meta")  # reading it would raise
    for kind in ("linear", "cosine"):
        assert lr_factor(kind, 10, 0.5)(done).device.type == "meta"


@pytest.mark.parametrize(("first", "last"), [(2.0, 0.5), (0.5, 2.0)])
def test_a_number_moves_evenly_and_rests(first, last):
    middle = (first + last) / 2
    assert [linear(first, last, 4, done) for done in (0, 2, 4, 9)] == [first, middle, last, last]


# ------------------------------------------------------------------------------------------------------ exploration


def epsilon(frames, first=1.0, last=0.05, steps=1000, episodes=0):
    return epsilon_at("linear", first, last, decay=0.5, steps=steps, frames=frames, episodes=episodes)


def exponential(episodes, first=1.0, last=0.01, decay=0.995, frames=0):
    return epsilon_at("exponential", first, last, decay=decay, steps=1, frames=frames, episodes=episodes)


def test_epsilon_falls_linearly_with_the_frames():
    found = [epsilon(frames) for frames in (0, 100, 500, 999, 1000, 10**9)]
    assert found == pytest.approx([1.0, 0.905, 0.525, 0.05095, 0.05, 0.05])
    assert epsilon(500, episodes=10**6) == epsilon(500), "episodes do not matter"


def test_epsilon_falls_by_a_factor_for_every_episode():
    assert [exponential(episodes) for episodes in (0, 1, 2)] == pytest.approx([1.0, 0.995, 0.990025])
    assert exponential(100) == pytest.approx(0.6057704)
    assert [exponential(n, decay=0.5) for n in range(4)] == [1.0, 0.5, 0.25, 0.125]
    # ln 0.01 / ln 0.995 = 918.7
    assert exponential(918) > 0.01
    assert [exponential(n) for n in (919, 10**6)] == [0.01, 0.01]
    assert exponential(100, frames=10**9) == exponential(100), "frames do not matter"


@given(
    kind=st.sampled_from(["linear", "exponential"]),
    last=st.floats(0, 1),
    first=st.floats(0, 1),
    done=st.integers(0, 10**9),
)
def test_epsilon_is_a_probability_between_its_ends(kind, last, first, done):
    last, first = sorted((last, first))
    found = epsilon_at(kind, first, last, decay=0.99, steps=500, frames=done, episodes=done)
    assert last <= found <= first
