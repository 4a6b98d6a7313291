"""The constants of the custom environment, shared by its TorchRL and its Gymnasium form; pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from fp8rl_torchrl.envs._constants import ROUNDING, positive, refuse_unless

START_POSITION = 0.5
"""An episode starts at a position uniform in plus or minus this."""
START_VELOCITY = 0.05
"""An episode starts at a velocity uniform in plus or minus this."""


@dataclass(frozen=True, kw_only=True)
class CustomConstants:
    """What one can set about the custom environment, and the limits that follow from it.

    Raises:
        ValueError: If a constant is outside the range in which the environment makes sense.
    """

    dt: float = 0.1
    """Seconds per step."""
    force: float = 1.0
    """Magnitude of the push; action 0 pushes left, action 1 right."""
    friction: float = 0.1
    """Deceleration per unit of velocity."""
    bound: float = 2.4
    """The episode terminates once the position is farther than this from 0."""
    target: float = 0.0
    """Position of highest reward."""
    survival_reward: float = 0.1
    """Reward of every step, on top of the distance term."""
    max_steps: int = 200
    """The episode is truncated after this many steps."""

    def __post_init__(self) -> None:
        """Refuse constants that make no environment."""
        requirements = {
            **positive(self, "dt", "force"),
            "friction must be >= 0 and friction * dt at most 1": 0 <= self.friction * self.dt <= 1,
            f"bound must be > {START_POSITION}, the farthest start": self.bound > START_POSITION,
            "target must lie within the bound": abs(self.target) <= self.bound,
        }
        refuse_unless(self, "CustomEnv", requirements)

    @property
    def terminal_velocity(self) -> float:
        """The speed at which friction cancels the push; infinite without friction."""
        return max(START_VELOCITY, self.force / self.friction) if self.friction > 0 else float("inf")

    @property
    def max_velocity(self) -> float:
        """The highest speed that an episode can reach, with room for float32 rounding."""
        accelerated = START_VELOCITY + self.force * self.dt * self.max_steps
        return min(accelerated, self.terminal_velocity) * ROUNDING

    @property
    def max_position(self) -> float:
        """The farthest position that an episode can reach: one step beyond the bound."""
        return (self.bound + self.max_velocity * self.dt) * ROUNDING

    @property
    def reward_range(self) -> tuple[float, float]:
        """The lowest and the highest reward of one step."""
        lowest = self.survival_reward + 1 - (self.max_position + abs(self.target)) / self.bound
        return lowest - 1e-5, self.survival_reward + 1 + 1e-5
