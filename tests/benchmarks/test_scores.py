"""The statistics of the comparison of precisions, against rliable 1.2.0's on the same numbers and against hand's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scores import (
    Paired,
    area,
    holm,
    iqm,
    iqm_interval,
    normalized,
    probability_of_improvement,
    profile,
    profile_interval,
)

# Ten seeds of two tasks, of two modes.
A = np.array(
    [
        [1.02, 0.97, 1.10, 0.88, 1.01, 0.99, 1.05, 0.41, 1.00, 0.93],
        [0.31, 0.55, 0.12, 0.80, 0.44, 0.61, 0.07, 0.39, 0.52, 0.48],
    ]
)
B = np.array(
    [
        [0.92, 0.90, 1.04, 0.58, 1.00, 0.97, 0.85, 0.61, 0.98, 0.83],
        [0.21, 0.35, 0.22, 0.70, 0.34, 0.41, 0.17, 0.29, 0.42, 0.58],
    ]
)


def test_the_interquartile_mean_is_rliables():
    assert iqm(A) == pytest.approx(0.717, abs=1e-12)
    assert iqm(B) == pytest.approx(0.623, abs=1e-12)


def test_the_stratified_interval_is_rliables():
    """Rliable drew 50,000 resamples: 0.577 to 0.821, and 0.520 to 0.726."""
    assert iqm_interval(A.tolist()) == pytest.approx((0.577, 0.821), abs=0.005)
    assert iqm_interval(B.tolist()) == pytest.approx((0.520, 0.726), abs=0.005)


def test_an_interval_is_stratified():
    """Tasks of one score each have nothing to resample, however far apart they are."""
    assert iqm_interval([[0.0] * 5, [1.0] * 5]) == pytest.approx((0.5, 0.5))


def test_the_probability_of_improvement_is_rliables():
    assert probability_of_improvement(A[0], B[0]) == pytest.approx(0.71)
    assert probability_of_improvement(A[1], B[1]) == pytest.approx(0.61)
    assert probability_of_improvement([1.0, 1.0], [1.0, 1.0]) == 0.5


def test_the_performance_profile_is_rliables():
    assert profile(A.ravel(), [0.0, 0.25, 0.5, 0.75, 1.0]).tolist() == pytest.approx([1.0, 0.9, 0.65, 0.5, 0.2])


def test_the_interval_of_a_profile_by_hand():
    """Five of ten runs lie above 0.5: those of a resample are binomial, and 2 and 8 of 10 are its outer percentiles.

    All lie above 0 and none above 2, however they are drawn.
    """
    half = [0.0, 1.0] * 5
    low, high = profile_interval([half], [-1.0, 0.5, 2.0])
    assert low.tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert high.tolist() == pytest.approx([1.0, 0.8, 0.0])


def test_the_interval_of_a_profile_keeps_the_tasks_apart():
    """Of two tasks, one with every run above the level and one with none, each resample has exactly a half above."""
    low, high = profile_interval([[1.0] * 10, [0.0] * 10], [0.5])
    assert (low.tolist(), high.tolist()) == ([0.5], [0.5])
    # Taken for one task they would not: the number above is binomial, of 20.
    low, high = profile_interval([[1.0] * 10 + [0.0] * 10], [0.5])
    assert low.tolist()[0] < 0.4 < 0.6 < high.tolist()[0]


def test_scores_by_hand():
    assert normalized("CartPole-v1", [22.0, 475.0, 248.5, math.nan, math.inf]).tolist() == [0.0, 1.0, 0.5, 0.0, 0.0]
    assert normalized("Pendulum-v1", [-1223.0, -180.0]).tolist() == [0.0, 1.0]


def test_the_area_by_hand():
    """Trapezoids of 0.5 · 10 and 1.0 · 30, over 40 frames."""
    assert area([0, 10, 40], [0.0, 1.0, 1.0]) == pytest.approx(35 / 40)
    assert area([10], [0.3]) == 0.3


# Mean 0.02, standard deviation 0.02 (n - 1), so a standard error of 0.02 / 3 over nine seeds.
NINE = Paired(differences=(0.02, 0.0, 0.04, 0.02, 0.0, 0.04, 0.02, 0.0, 0.04))


def test_equivalence_by_hand():
    error = math.sqrt(6 * 0.02**2 / 8) / 3
    # One-sided t quantiles with 8 degrees of freedom: 1.8595 leaves 5 %, 2.8965 leaves 1 %.
    assert NINE.equivalence(0.02 + 1.8595 * error) == pytest.approx(0.05, abs=1e-4)
    assert NINE.equivalence(0.02 + 2.8965 * error) == pytest.approx(0.01, abs=1e-4)
    assert NINE.smallest_margin() == pytest.approx(0.02 + 1.8595 * error, rel=1e-4)
    assert NINE.equivalence(0.02) == pytest.approx(0.5)
    assert NINE.reach() == pytest.approx(1.8595 * error, rel=1e-4)
    assert NINE.reach(tests=5) == pytest.approx(2.8965 * error, rel=1e-4)


def test_equivalence_is_statsmodels_two_one_sided_tests():
    from statsmodels.stats.weightstats import ttost_paired

    rng = np.random.default_rng(1)
    for margin in (0.02, 0.05, 0.2):
        ours, theirs = rng.normal(0, 0.1, 12), rng.normal(0.01, 0.1, 12)
        expected = ttost_paired(ours, theirs, -margin, margin)[0]
        assert Paired(differences=tuple(ours - theirs)).equivalence(margin) == pytest.approx(expected)


def test_at_a_tasks_ceiling_there_is_no_spread():
    same = Paired(differences=(0.0,) * 10)
    assert (same.equivalence(0.05), same.harm(), same.gain(), same.smallest_margin()) == (0.0, 1.0, 1.0, 0.0)
    shifted = Paired(differences=(-0.2,) * 10)
    assert shifted.equivalence(0.05) == 1.0
    assert shifted.harm() == pytest.approx(2**-10)


def test_harm_by_hand():
    """Of the 2^5 sign flips of five losses only the observed one is as bad; of mixed signs, count them."""
    assert Paired(differences=(-1.0, -2.0, -3.0, -4.0, -5.0)).harm() == pytest.approx(1 / 32)
    assert Paired(differences=(-1.0, -2.0, -3.0, -4.0, -5.0)).gain() == 1.0
    # The sums of ±1 ±2 ±4 are the odd numbers from -7 to 7; -7, -5 and -3 are no larger than the observed -3.
    assert Paired(differences=(-1.0, 2.0, -4.0)).harm() == pytest.approx(3 / 8)


def test_holm_by_hand():
    """The smallest times 3, the next times 2, the last as it is, and none below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=9), st.floats(0.001, 3))
def test_a_wider_margin_is_easier_to_keep(differences, margin):
    pair = Paired(differences=tuple(differences))
    assert pair.equivalence(margin) >= pair.equivalence(2 * margin)
    assert pair.equivalence(1.001 * pair.smallest_margin() + 1e-9) <= 0.05 + 1e-9


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=8))
def test_harm_and_gain_mirror_each_other(differences):
    mirrored = Paired(differences=tuple(-each for each in differences))
    assert Paired(differences=tuple(differences)).harm() == pytest.approx(mirrored.gain())
