"""What changes in the course of a run: learning rates and exploration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def lr_factor(kind: str, updates: int, final: float) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A factor on the learning rate as a function of the updates done, computed on the device.

    Args:
        kind: ``"linear"`` or ``"cosine"`` (Loshchilov and Hutter, 2017, equation 5, without restarts) falls from 1 to
            ``final``, ``"constant"`` gives None.
        updates: How many updates the fall takes; the factor stays at ``final`` then.
        final: The last factor.
    """
    if kind == "constant":
        return None

    def falling(done: torch.Tensor) -> torch.Tensor:
        return (1 - (1 - final) * done / updates).clamp(min=final)

    def cosine(done: torch.Tensor) -> torch.Tensor:
        passed = (done / updates).clamp(max=1.0)
        return final + (1 - final) * (1 + torch.cos(math.pi * passed)) / 2

    return cosine if kind == "cosine" else falling


def linear(first: float, last: float, steps: float, done: float) -> float:
    """A number that moves evenly from ``first`` to ``last`` in so many steps, and stays there."""
    return last if done >= steps else first + (last - first) * done / steps


def epsilon_at(
    kind: str, first: float, last: float, *, decay: float, steps: float, frames: int, episodes: int
) -> float:
    """The probability of a random action, as a function of what has been done.

    Args:
        kind: ``"linear"`` falls from ``first`` to ``last`` over ``steps`` frames, ``"exponential"`` is ``first`` times
            ``decay`` for every episode, but not below ``last``.
        first: The probability at the start.
        last: The lowest one.
        decay: Factor per episode.
        steps: Frames.
        frames: Environment steps so far.
        episodes: Episodes so far.
    """
    if kind == "exponential":
        return max(last, first * decay**episodes)
    return linear(first, last, steps, frames)
