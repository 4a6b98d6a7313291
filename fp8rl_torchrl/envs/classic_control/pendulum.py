"""`PendulumEnv`: swing a pendulum up and keep it there, Gymnasium's Pendulum-v1 as a native, batched environment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fp8rl_torchrl.envs._constants import ROUNDING, positive, refuse_unless
from fp8rl_torchrl.envs.classic_control._angles import wrapped
from fp8rl_torchrl.envs.native import Limits, NativeEnv, episode_start
from fp8rl_torchrl.envs.noise import uniform

_START_SPEED = 1.0
# The cost of a step: of the distance from upright, of the speed and of the torque, each squared.
_SPEED_COST = 0.1
_TORQUE_COST = 0.001


class PendulumState(NamedTuple):
    """All that one step needs, each of shape ``[N]`` (or ``[]``).

    ``angle`` (rad, 0 is upright; it goes on counting beyond ±π, as Gymnasium's does) and ``angular_velocity`` (rad/s),
    both float32, are the physics; the rest is what every state has, see `fp8rl_torchrl.envs.native.Dynamics`.
    """

    angle: torch.Tensor
    angular_velocity: torch.Tensor
    step_count: torch.Tensor
    episode_reward: torch.Tensor
    seed: torch.Tensor
    index: torch.Tensor
    episode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class PendulumDynamics:
    """The constants of `PendulumEnv`, by default those of Gymnasium's Pendulum-v1, and its pure functions of tensors.

    The pendulum is a rod on a hinge, without friction; the moment of inertia is ``mass * length² / 3``.

    Raises:
        ValueError: If a constant is outside the range in which the environment makes sense.
    """

    gravity: float = 10.0
    """Acceleration of free fall, m/s²."""
    mass: float = 1.0
    """Mass of the rod, kg."""
    length: float = 1.0
    """Length of the rod, m."""
    max_torque: float = 2.0
    """Torques are clipped to plus or minus this, N m."""
    max_speed: float = 8.0
    """The angular velocity is clipped to plus or minus this, rad/s."""
    dt: float = 0.05
    """Seconds per step."""
    max_steps: int = 200
    """The episode is truncated after this many steps."""

    def __post_init__(self) -> None:
        """Refuse constants that make no environment."""
        requirements = positive(self, "gravity", "mass", "length", "max_torque", "dt")
        requirements[f"max_speed must be >= {_START_SPEED}, the fastest start"] = self.max_speed >= _START_SPEED
        refuse_unless(self, "PendulumEnv", requirements)

    def step(
        self, state: PendulumState, action: torch.Tensor
    ) -> tuple[PendulumState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance by one step of semi-implicit Euler: velocity first, then the angle from the new velocity.

        Args:
            state: The state before the step.
            action: float32 ``[N, 1]``, the torque (N m), which is clipped.

        Returns:
            The next state, the next observation (float32 ``[N, 3]``), the reward (float32 ``[N]``: minus the cost of
            the torque and of the state before the step), ``terminated`` (always False) and ``truncated`` (bool
            ``[N]``).
        """
        torque = action.squeeze(-1).clamp(-self.max_torque, self.max_torque)
        off, speed = wrapped(state.angle), state.angular_velocity
        reward = -(off.square() + _SPEED_COST * speed.square() + _TORQUE_COST * torque.square())

        falling = (1.5 * self.gravity / self.length) * state.angle.sin()
        speed = speed + (falling + (3 / (self.mass * self.length**2)) * torque) * self.dt
        speed = speed.clamp(-self.max_speed, self.max_speed)
        step_count = state.step_count + 1
        next_state = state._replace(
            angle=state.angle + speed * self.dt,
            angular_velocity=speed,
            step_count=step_count,
            episode_reward=state.episode_reward + reward,
        )
        truncated = step_count >= self.max_steps
        return next_state, self.observe(next_state), reward, torch.zeros_like(truncated), truncated

    @staticmethod
    def reset(seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> PendulumState:
        """Start an episode: the angle uniform in ±π, the angular velocity in ±1, both a hash of the three counters.

        Args:
            seed: int64 ``[N]``, the seed of the batch.
            index: int64 ``[N]``, the place of each environment in the batch.
            episode: int64 ``[N]``, the number of the episode to start, counted from 0.

        Returns:
            The state at the start, each field of the counters' shape.
        """
        turn, speed = (2 * uniform(seed, index, episode, streams=2) - 1).unbind()
        return episode_start(
            PendulumState, seed, index, episode, angle=turn * math.pi, angular_velocity=speed * _START_SPEED
        )

    @staticmethod
    def observe(state: PendulumState) -> torch.Tensor:
        """The cosine and the sine of the angle, and the angular velocity, float32 ``[N, 3]``."""
        return torch.stack((state.angle.cos(), state.angle.sin(), state.angular_velocity), -1)

    @property
    def limits(self) -> Limits:
        """Where an episode stays: the angle cannot turn farther than at full speed in every step."""
        one, speed = (-ROUNDING, ROUNDING), (-self.max_speed, self.max_speed)
        # Every addition of a float32 sum may round up by 2^-24 of the sum.
        angle = (math.pi + self.max_steps * self.max_speed * self.dt) * (ROUNDING + self.max_steps * 2.0**-23)
        cost = math.pi**2 + _SPEED_COST * self.max_speed**2 + _TORQUE_COST * self.max_torque**2
        return Limits(
            actions=((-self.max_torque, self.max_torque),),
            observation=(one, one, speed),
            state={"angle": (-angle, angle), "angular_velocity": speed},
            reward=(-cost * ROUNDING, 0.0),
            max_steps=self.max_steps,
        )


class PendulumEnv(NativeEnv):
    """Swing a pendulum up by a torque too weak to lift it, and keep it up: Gymnasium's Pendulum-v1, native and batched.

    One step equals Gymnasium's up to the rounding of float32 (Gymnasium computes in float64), and so do the rewards and
    the ends of episodes; the start states have the same distribution. Gymnasium names no return as solved.

    Its TensorDicts are described in `NativeEnv`. ``observation`` is ``[N, 3]``: the cosine and the sine of the angle
    (0 is upright) and the angular velocity (rad/s); ``action`` is the torque, ``[N, 1]``, within ±2 N m and clipped to
    that. A step pays ``-(angle² + 0.1 angular_velocity² + 0.001 torque²)`` of the state before it, with the angle
    within ±π: from -16.27 to 0. An episode never terminates, and is truncated after 200 steps.

    ``("state", "angle")`` counts turns, and the more there are, the coarser float32 resolves it: to 4e-6 rad after 200
    steps at full speed, to 5e-4 rad after 20,000.

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of `PendulumDynamics`: ``gravity``, ``mass``, ``length``, ``max_torque``,
            ``max_speed``, ``dt``, ``max_steps``.

    Raises:
        ValueError: If ``num_envs`` is not positive or a constant is out of range.
        TypeError: If a constant is unknown.

    Example:
        >>> env = PendulumEnv(num_envs=4, seed=0)
        >>> env.rollout(5)["next", "observation"].shape
        torch.Size([4, 5, 3])
    """

    state_type = PendulumState
    dynamics_type = PendulumDynamics
    dynamics: PendulumDynamics
