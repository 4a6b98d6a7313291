"""How numbers over seeds are shown: their spread, an interval, and a table for a Markdown file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import numpy as np

RESAMPLES = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean: percentiles of the means of resampled values; the same values give the same.

    It is of the mean: with five values, the one of the median would always reach from their minimum to their maximum.

    Args:
        values: One a seed.
        level: The probability between the two percentiles.
    """
    drawn = np.random.default_rng(0).choice(np.asarray(values, dtype=np.float64), (RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """``median (min to max)``."""
    return "{} ({} to {})".format(*(form.format(value) for value in (median(values), min(values), max(values))))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a Markdown file."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
