"""What the constants of every native task have in common; pure Python, as a form of a task without torch needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

ROUNDING = 1 + 1e-5
"""Limits are widened by this factor: float32 steps may round past a bound that holds for real numbers."""


def refuse_unless(constants: Any, env: str, requirements: Mapping[str, bool]) -> None:
    """Refuse constants that make no environment.

    Args:
        constants: A dataclass of numbers, ``max_steps`` among them.
        env: The name of the environment, for the message.
        requirements: What must hold of these constants, and whether it does. That ``max_steps`` is a positive integer
            and that every constant is finite is required of all.

    Raises:
        ValueError: If a requirement is not met, naming the first.
    """
    whole = isinstance(constants.max_steps, int) and not isinstance(constants.max_steps, bool)
    finite = all(math.isfinite(getattr(constants, field.name)) for field in fields(constants))
    of_all = {
        "max_steps must be an integer >= 1": whole and constants.max_steps >= 1,
        "every constant must be a finite number": finite,
    }
    for requirement, met in {**requirements, **of_all}.items():
        if not met:
            raise ValueError(f"{env}: {requirement}; got {constants}")


def positive(constants: Any, *names: str) -> dict[str, bool]:
    """The requirement, for `refuse_unless`, that each of some constants is above zero."""
    return {f"{name} must be > 0": getattr(constants, name) > 0 for name in names}
