"""`AcrobotEnv`: swing a two-link robot up by its elbow, Gymnasium's Acrobot-v1 as a native, batched environment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fp8rl_torchrl.envs._constants import ROUNDING, positive, refuse_unless
from fp8rl_torchrl.envs.classic_control._angles import wrapped
from fp8rl_torchrl.envs.native import Limits, NativeEnv, episode_start
from fp8rl_torchrl.envs.noise import uniform

_START = 0.1
_OVERFLOW = 1e36  # well below float32's largest number

_Physics = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class AcrobotState(NamedTuple):
    """All that one step needs, each of shape ``[N]`` (or ``[]``).

    ``angle_1`` (rad, of the first link, 0 hangs down), ``angle_2`` (rad, of the second link relative to the first),
    both within ±π, ``velocity_1`` and ``velocity_2`` (rad/s), all float32, are the physics; the rest is what every
    state has, see `fp8rl_torchrl.envs.native.Dynamics`.
    """

    angle_1: torch.Tensor
    angle_2: torch.Tensor
    velocity_1: torch.Tensor
    velocity_2: torch.Tensor
    step_count: torch.Tensor
    episode_reward: torch.Tensor
    seed: torch.Tensor
    index: torch.Tensor
    episode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AcrobotDynamics:
    """The constants of `AcrobotEnv`, by default those of Gymnasium's Acrobot-v1, and its pure functions of tensors.

    The equations are those of a double pendulum with a motor at the elbow (Sutton and Barto, "Reinforcement Learning:
    An Introduction", the acrobot example), written with the inverse of the mass matrix.

    Raises:
        ValueError: If a constant is outside the range in which the environment makes sense.
    """

    gravity: float = 9.8
    """Acceleration of free fall, m/s²."""
    mass_1: float = 1.0
    """Mass of the first link, kg."""
    mass_2: float = 1.0
    """Mass of the second link, kg."""
    length_1: float = 1.0
    """Length of the first link, m."""
    length_2: float = 1.0
    """Length of the second link, m; it counts for the height alone."""
    center_1: float = 0.5
    """From the fixed end to the first link's center of mass, m."""
    center_2: float = 0.5
    """From the elbow to the second link's center of mass, m."""
    inertia: float = 1.0
    """Moment of inertia of each link about its center of mass, kg m²."""
    torque: float = 1.0
    """Magnitude of the torque at the elbow, N m; action 0 is minus this, 1 none, 2 plus this."""
    max_velocity_1: float = 4 * math.pi
    """The angular velocity of the first link is clipped to plus or minus this, rad/s."""
    max_velocity_2: float = 9 * math.pi
    """That of the second link likewise."""
    goal_height: float = 1.0
    """The episode terminates once the free end is higher than this above the fixed end, m."""
    dt: float = 0.2
    """Seconds per step."""
    max_steps: int = 500
    """The episode is truncated after this many steps."""

    def __post_init__(self) -> None:
        """Refuse constants that make no environment."""
        names = ("gravity", "mass_1", "mass_2", "length_1", "length_2", "center_1", "center_2", "inertia", "torque")
        requirements = positive(self, *names, "dt")
        for name in ("max_velocity_1", "max_velocity_2"):
            requirements[f"{name} must be >= {_START}, the fastest start"] = getattr(self, name) >= _START
        reachable = 0 <= self.goal_height < self.length_1 + self.length_2
        requirements["goal_height must be >= 0 and below length_1 + length_2"] = reachable
        refuse_unless(self, "AcrobotEnv", requirements)
        requirement = "dt must be smaller for such forces and speeds, or a step may overflow"
        refuse_unless(self, "AcrobotEnv", {requirement: self._highest_acceleration() < _OVERFLOW})

    def step(
        self, state: AcrobotState, action: torch.Tensor
    ) -> tuple[AcrobotState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance by one step of the classical Runge-Kutta method of fourth order.

        Args:
            state: The state before the step.
            action: int64 ``[N]``: a torque of minus (0), zero (1) or plus (2) ``torque``.

        Returns:
            The next state, the next observation (float32 ``[N, 6]``), the reward (float32 ``[N]``: 0 for the step that
            reaches the goal, else -1), ``terminated`` and ``truncated`` (bool ``[N]``).
        """
        before: _Physics = (state.angle_1, state.angle_2, state.velocity_1, state.velocity_2)
        torque = (action - 1).to(state.angle_1.dtype) * self.torque
        first = self._slope(before, torque)
        second = self._slope(_moved(before, first, self.dt / 2), torque)
        third = self._slope(_moved(before, second, self.dt / 2), torque)
        fourth = self._slope(_moved(before, third, self.dt), torque)
        total = [a + 2 * b + 2 * c + d for a, b, c, d in zip(first, second, third, fourth, strict=True)]
        angle_1, angle_2, velocity_1, velocity_2 = _moved(before, total, self.dt / 6)

        angle_1, angle_2 = wrapped(angle_1), wrapped(angle_2)
        height = -self.length_1 * angle_1.cos() - self.length_2 * (angle_1 + angle_2).cos()
        terminated = height > self.goal_height
        reward = terminated.to(angle_1.dtype) - 1
        step_count = state.step_count + 1
        next_state = state._replace(
            angle_1=angle_1,
            angle_2=angle_2,
            velocity_1=velocity_1.clamp(-self.max_velocity_1, self.max_velocity_1),
            velocity_2=velocity_2.clamp(-self.max_velocity_2, self.max_velocity_2),
            step_count=step_count,
            episode_reward=state.episode_reward + reward,
        )
        return next_state, self.observe(next_state), reward, terminated, step_count >= self.max_steps

    def _slope(self, physics: _Physics, torque: torch.Tensor) -> _Physics:
        """The time derivatives, of the velocities by ``[[a + b + 2c, b + c], [b + c, b]] · accelerations = torques``.

        There ``c`` is that of `_masses` times the cosine of the second angle.
        """
        angle_1, angle_2, velocity_1, velocity_2 = physics
        a, b, c, smallest = self._masses()
        sine, cosine = c * angle_2.sin(), c * angle_2.cos()
        weight_2 = (self.mass_2 * self.center_2 * self.gravity) * (angle_1 + angle_2).sin()
        weight_1 = ((self.mass_1 * self.center_1 + self.mass_2 * self.length_1) * self.gravity) * angle_1.sin()
        at_shoulder = sine * velocity_2 * (velocity_2 + 2 * velocity_1) - weight_1 - weight_2
        at_elbow = torque - sine * velocity_1.square() - weight_2
        determinant, outer = smallest + sine.square(), b + cosine
        acceleration_1 = (b * at_shoulder - outer * at_elbow) / determinant
        acceleration_2 = ((a + b + 2 * cosine) * at_elbow - outer * at_shoulder) / determinant
        return velocity_1, velocity_2, acceleration_1, acceleration_2

    def _masses(self) -> tuple[float, float, float, float]:
        """What the mass matrix is made of, and its smallest determinant, ``a b - c²``, without cancellation."""
        first = self.mass_1 * self.center_1**2 + self.inertia
        second = self.mass_2 * self.length_1**2
        b, c = self.mass_2 * self.center_2**2 + self.inertia, self.mass_2 * self.length_1 * self.center_2
        return first + second, b, c, first * b + second * self.inertia

    def _highest_acceleration(self) -> float:
        """A bound of all accelerations within a step, rad/s², from the largest value of every term of `_slope`."""
        a, b, c, smallest = self._masses()
        weight_2 = self.mass_2 * self.center_2 * self.gravity
        weight_1 = (self.mass_1 * self.center_1 + self.mass_2 * self.length_1) * self.gravity
        outer = b + c
        faster_1 = faster_2 = 0.0
        for time in (0.0, self.dt / 2, self.dt / 2, self.dt):
            fast_1, fast_2 = self.max_velocity_1 + time * faster_1, self.max_velocity_2 + time * faster_2
            at_shoulder = c * fast_2 * (fast_2 + 2 * fast_1) + weight_1 + weight_2
            at_elbow = self.torque + c * fast_1 * fast_1 + weight_2
            faster_1 = (b * at_shoulder + outer * at_elbow) / smallest
            faster_2 = ((a + b + 2 * c) * at_elbow + outer * at_shoulder) / smallest
        return max(faster_1, faster_2)

    @staticmethod
    def reset(seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> AcrobotState:
        """Start an episode: all four physical numbers uniform in ±0.1, each a hash of the three counters.

        Args:
            seed: int64 ``[N]``, the seed of the batch.
            index: int64 ``[N]``, the place of each environment in the batch.
            episode: int64 ``[N]``, the number of the episode to start, counted from 0.

        Returns:
            The state at the start, each field of the counters' shape.
        """
        noise = (2 * uniform(seed, index, episode, streams=4) - 1) * _START
        names = ("angle_1", "angle_2", "velocity_1", "velocity_2")
        return episode_start(AcrobotState, seed, index, episode, **dict(zip(names, noise.unbind(), strict=True)))

    @staticmethod
    def observe(state: AcrobotState) -> torch.Tensor:
        """Cosine and sine of the first and of the second angle, both angular velocities, float32 ``[N, 6]``."""
        angle_1, angle_2 = state.angle_1, state.angle_2
        turns = (angle_1.cos(), angle_1.sin(), angle_2.cos(), angle_2.sin())
        return torch.stack((*turns, state.velocity_1, state.velocity_2), -1)

    @property
    def limits(self) -> Limits:
        """Where an episode stays: angles are wrapped and velocities clipped."""
        one, half_turn = (-ROUNDING, ROUNDING), (-math.pi, math.pi)
        velocities = [(-each, each) for each in (self.max_velocity_1, self.max_velocity_2)]
        state = {"angle_1": half_turn, "angle_2": half_turn, "velocity_1": velocities[0], "velocity_2": velocities[1]}
        return Limits(
            actions=3,
            observation=(one, one, one, one, *velocities),
            state=state,
            reward=(-1.0, 0.0),
            max_steps=self.max_steps,
        )


def _moved(physics: _Physics, slope: _Physics | list[torch.Tensor], time: float) -> _Physics:
    """The physics after some time at a given slope."""
    angle_1, angle_2, velocity_1, velocity_2 = (x + time * dx for x, dx in zip(physics, slope, strict=True))
    return angle_1, angle_2, velocity_1, velocity_2


class AcrobotEnv(NativeEnv):
    """Swing the free end of two links up by a torque at the elbow: Gymnasium's Acrobot-v1, native and batched.

    One step equals Gymnasium's up to the rounding of float32 (Gymnasium computes in float64), and so do the rewards and
    the ends of episodes; the start states have the same distribution. Solved: mean return ≥ -100.

    Its TensorDicts are described in `NativeEnv`. ``observation`` is ``[N, 6]``: cosine and sine of the first link's
    angle (0 hangs down), cosine and sine of the second link's (relative to the first), and both angular velocities
    (rad/s); ``action`` is a torque of -1 (0), 0 (1) or 1 (2) N m; every step pays -1, but the one that reaches the goal
    0; an episode is terminated once the free end is more than 1 m above the fixed one, and truncated after 500 steps.

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of `AcrobotDynamics`: ``gravity``, ``mass_1``, ``mass_2``, ``length_1``, ``length_2``,
            ``center_1``, ``center_2``, ``inertia``, ``torque``, ``max_velocity_1``, ``max_velocity_2``,
            ``goal_height``, ``dt``, ``max_steps``.

    Raises:
        ValueError: If ``num_envs`` is not positive or a constant is out of range.
        TypeError: If a constant is unknown.

    Example:
        >>> env = AcrobotEnv(num_envs=4, seed=0)
        >>> env.rollout(5)["next", "observation"].shape
        torch.Size([4, 5, 6])
    """

    state_type = AcrobotState
    dynamics_type = AcrobotDynamics
    dynamics: AcrobotDynamics
