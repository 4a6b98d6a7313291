"""Which number format each part of learning runs in."""

from fp8rl_torchrl.precision.mode import Precision

__all__ = ["Precision"]
