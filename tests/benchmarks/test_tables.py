"""How numbers over seeds are shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import interval, markdown, spread


def test_an_interval_by_hand():
    """Of four zeros and a one, the mean of a resample is a fifth of a binomial number: n = 5, p = 1/5.

    P(X = 0) = 0.33, so the lower end is 0. P(X <= 2) = 0.942 and P(X <= 3) = 0.993, so the upper one is 3/5.
    """
    assert interval([0.0, 0.0, 0.0, 0.0, 1.0]) == pytest.approx((0.0, 0.6))
    # P(X <= 1) = 0.737 and P(X <= 2) = 0.942: the upper end of the 80 % interval, at 0.9, is 2/5.
    assert interval([0.0, 0.0, 0.0, 0.0, 1.0], 0.8) == pytest.approx((0.0, 0.4))


def test_an_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(10.0, 2.0, 400)
    low, high = interval(list(values))
    error = values.std() / 20  # of the mean of 400
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.integers(-1000, 1000))
def test_an_interval_lies_within_the_values_and_moves_with_them(values, shift):
    low, high = interval(values)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert interval(values) == (low, high), "drawn from a stream of its own"
    moved = interval([value + shift for value in values])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_a_spread_and_a_markdown_table():
    assert spread([3.0, 1.0, 2.0, 10.0]) == "2.5 (1.0 to 10.0)"
    assert spread([1234.0], "{:,.0f}") == "1,234 (1,234 to 1,234)"
    assert markdown(("a", "b"), [("1", "2"), ("3", "4")]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2 |",
        "| 3 | 4 |",
    ]
