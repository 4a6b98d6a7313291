"""Angles between -π and π."""

from __future__ import annotations

import math

import torch

# One turn is their sum. The first has so few bits that its product with a number of turns below 2^16 is exact.
_MOST_OF_A_TURN = 6.28125
_REST_OF_A_TURN = 2 * math.pi - _MOST_OF_A_TURN


def wrapped(angle: torch.Tensor) -> torch.Tensor:
    """The same direction within ±π, as exactly as the angle is given.

    Args:
        angle: Of any shape, rad. Beyond 4e5 the direction is lost, but the result is within ±π all the same.
    """
    turns = (angle * (1 / (2 * math.pi))).round()
    return (angle - turns * _MOST_OF_A_TURN - turns * _REST_OF_A_TURN).clamp(-math.pi, math.pi)
