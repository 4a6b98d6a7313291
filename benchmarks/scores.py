"""Scores of runs, and what they say about precisions: intervals, profiles, and tests of equivalence and of harm.

The practice follows Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021):
scores normalised per task, interquartile means, bootstrap intervals stratified by task, performance profiles and the
probability of improvement. The question "does it cost anything?" is answered by a test of equivalence (two one-sided
tests, Schuirmann 1987) on seeds paired across modes, and not by the absence of a significant difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import integrate, stats
from statsmodels.stats.multitest import multipletests

RANDOM_TO_SOLVED: dict[str, tuple[float, float]] = {
    "CustomEnv": (73.5, 215.0),
    "CartPole-v1": (22.0, 475.0),
    "Acrobot-v1": (-499.0, -100.0),
    "Pendulum-v1": (-1223.0, -180.0),
    "MountainCar-v0": (-200.0, -110.0),
    "MountainCarContinuous-v0": (-33.2, 90.0),
    "LunarLander-v3": (-180.0, 200.0),
}
"""The mean return of uniformly random actions, and the one from which a task counts as solved: scores 0 and 1."""
LEVEL = 0.95
"""Of all intervals, and 1 minus the level of all tests."""
RESAMPLES = 10_000
PROFILE_RESAMPLES = 2000
"""Of a profile, which is a number at each of many levels."""
EXACT_UP_TO = 2**16
"""Sign flips that are all tried; beyond, so many are drawn."""


def normalized(task: str, returns: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns as scores: 0 for random actions, 1 where the task counts as solved; what is not finite scores 0.

    Raises:
        KeyError: If the task's scale is not known.
    """
    low, high = RANDOM_TO_SOLVED[task]
    scores = (np.asarray(returns, dtype=np.float64) - low) / (high - low)
    return np.where(np.isfinite(scores), scores, 0.0)


def area(frames: Sequence[float], scores: Sequence[float] | np.ndarray) -> float:
    """The mean score over training: the area under the curve from the first to the last evaluation, by its length."""
    values, at = np.asarray(scores, dtype=np.float64), np.asarray(frames, dtype=np.float64)
    if len(at) == 1:
        return float(values[0])
    return float(integrate.trapezoid(values, at) / (at[-1] - at[0]))


def iqm(values: Sequence[float] | np.ndarray, axis: int | None = None) -> Any:
    """The interquartile mean: of the middle half of the values."""
    values = np.asarray(values)
    return stats.trim_mean(values.ravel() if axis is None else values, 0.25, axis=-1 if axis is None else axis)


def iqm_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Bootstrap interval of the interquartile mean of some tasks' scores taken together; each task is resampled alone.

    Percentiles of `RESAMPLES` resamples, the same at every call.

    Args:
        strata: The scores of each task, one a seed; at least two in all.
    """
    pooled = [np.asarray(each, dtype=np.float64) for each in strata]
    if np.ptp(np.concatenate(pooled)) == 0:
        return float(pooled[0][0]), float(pooled[0][0])

    def statistic(*samples: np.ndarray, axis: int = -1) -> Any:
        return iqm(np.concatenate(samples, axis=axis), axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            pooled, statistic, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=0
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def profile(scores: Sequence[float] | np.ndarray, levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """The part of the runs whose score is above each level."""
    return (np.asarray(scores)[:, None] > np.asarray(levels)[None]).mean(0)


def profile_interval(
    strata: Sequence[Sequence[float]], levels: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap interval of the profile of some tasks' scores taken together, at each level by itself.

    Args:
        strata: The scores of each task, one a seed; each is resampled alone.
        levels: Scores.

    Returns:
        The lower and the upper end, one a level.
    """
    above = [np.asarray(each)[None] > np.asarray(levels)[:, None] for each in strata]
    found = stats.bootstrap(
        above,
        lambda *samples, axis: np.concatenate(samples, axis=axis).mean(axis),
        axis=-1,
        n_resamples=PROFILE_RESAMPLES,
        batch=100,
        confidence_level=LEVEL,
        method="percentile",
        rng=0,
    )
    return found.confidence_interval.low, found.confidence_interval.high


def probability_of_improvement(scores: Sequence[float], others: Sequence[float]) -> float:
    """The probability that a run of one mode scores above one of another; ties count half (Mann and Whitney)."""
    return float(stats.mannwhitneyu(scores, others).statistic) / (len(scores) * len(others))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A mode's scores minus those of the reference, seed by seed."""

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean difference."""
        return float(np.mean(self.differences))

    def equivalence(self, margin: float) -> float:
        """The p-value of the two one-sided t-tests: small if the mean difference surely lies within ± the margin."""
        spread = self._standard_error()
        if spread == 0:
            return 0.0 if abs(self.mean) < margin else 1.0
        free = len(self.differences) - 1
        return float(stats.t.sf((margin - abs(self.mean)) / spread, free))

    def harm(self) -> float:
        """The p-value of the exact test by sign flips: small if the mode is surely worse, by however little."""
        return self._flips("less")

    def gain(self) -> float:
        """Likewise: small if it is surely better."""
        return self._flips("greater")

    def smallest_margin(self, tests: int = 1) -> float:
        """The smallest margin within which these differences would be called equivalent, at `LEVEL`.

        Args:
            tests: How many are made, each of which then has its part of what `LEVEL` leaves.
        """
        return abs(self.mean) + self.reach(tests)

    def reach(self, tests: int = 1) -> float:
        """How far to each side of the mean the test of equivalence looks, at `LEVEL`.

        Args:
            tests: How many are made, each of which then has its part of what `LEVEL` leaves.
        """
        free = len(self.differences) - 1
        return float(stats.t.isf((1 - LEVEL) / tests, free)) * self._standard_error()

    def _standard_error(self) -> float:
        values = np.asarray(self.differences)
        # Rounding is no spread: what is equal up to it counts as equal.
        if np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
            return 0.0
        return float(stats.sem(values))

    def _flips(self, side: Any) -> float:
        if not any(self.differences):
            return 1.0
        found = stats.permutation_test(
            (np.asarray(self.differences),),
            np.mean,
            permutation_type="samples",
            alternative=side,
            n_resamples=EXACT_UP_TO,
            rng=0,
        )
        return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of a family of tests, each corrected for the others (Holm, 1979)."""
    corrected: Any = multipletests(list(p_values), method="holm")[1] if p_values else ()
    return [float(each) for each in corrected]
