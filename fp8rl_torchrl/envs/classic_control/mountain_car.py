"""`MountainCarEnv` and `MountainCarContinuousEnv`: rock a car out of a valley, as Gymnasium's of these names do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fp8rl_torchrl.envs._constants import positive, refuse_unless
from fp8rl_torchrl.envs.native import Limits, NativeEnv, episode_start
from fp8rl_torchrl.envs.noise import uniform

_START = (-0.6, -0.4)


class MountainCarState(NamedTuple):
    """All that one step needs, each of shape ``[N]`` (or ``[]``).

    ``position`` (m) and ``velocity`` (m per step), both float32, are the physics; the rest is what every state has, see
    `fp8rl_torchrl.envs.native.Dynamics`.
    """

    position: torch.Tensor
    velocity: torch.Tensor
    step_count: torch.Tensor
    episode_reward: torch.Tensor
    seed: torch.Tensor
    index: torch.Tensor
    episode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class MountainCarDynamics:
    """The constants of `MountainCarEnv`, by default those of Gymnasium's MountainCar-v0, and its pure functions.

    The car moves along ``x`` on a road of height ``sin(3 x)``; time is counted in steps.

    Raises:
        ValueError: If a constant is outside the range in which the environment makes sense.
    """

    force: float = 0.001
    """By how much a full push changes the velocity in one step, m per step²."""
    gravity: float = 0.0025
    """By how much the steepest slope does, m per step²."""
    min_position: float = -1.2
    """A wall that stops the car, m."""
    max_position: float = 0.6
    """The end of the road, m; the car gets no farther."""
    max_speed: float = 0.07
    """The velocity is clipped to plus or minus this, m per step."""
    goal_position: float = 0.5
    """The episode terminates where the car gets as far as this, m, ..."""
    goal_velocity: float = 0.0
    """... and is at least as fast as this, m per step."""
    max_steps: int = 200
    """The episode is truncated after this many steps."""

    def __post_init__(self) -> None:
        """Refuse constants that make no environment."""
        low, high = _START
        requirements = {
            **positive(self, "force", "gravity", "max_speed"),
            f"min_position must be <= {low}, the leftmost start": self.min_position <= low,
            f"goal_position must be > {high}, the rightmost start": self.goal_position > high,
            "goal_position must be at most max_position": self.goal_position <= self.max_position,
            "goal_velocity must be at most max_speed": self.goal_velocity <= self.max_speed,
        }
        refuse_unless(self, type(self).__name__.replace("Dynamics", "Env"), requirements)

    def step(
        self, state: MountainCarState, action: torch.Tensor
    ) -> tuple[MountainCarState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance by one step of semi-implicit Euler: velocity first, then position from the new velocity.

        Args:
            state: The state before the step.
            action: int64 ``[N]``, 0 (push left), 1 (no push) or 2 (push right).

        Returns:
            The next state, the next observation (float32 ``[N, 2]``), the reward (float32 ``[N]``: -1, also for the
            last step), ``terminated`` and ``truncated`` (bool ``[N]``).
        """
        position, velocity, terminated = self._move(state, (action - 1).to(state.position.dtype))
        return self._arrive(state, position, velocity, -torch.ones_like(position), terminated)

    def _move(self, state: MountainCarState, push: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next position and velocity, and whether the goal is reached, after a push ``[N]`` within ±1."""
        velocity = state.velocity + push * self.force - self.gravity * (3 * state.position).cos()
        velocity = velocity.clamp(-self.max_speed, self.max_speed)
        position = (state.position + velocity).clamp(self.min_position, self.max_position)
        stopped = (position <= self.min_position) & (velocity < 0)
        velocity = velocity.masked_fill(stopped, 0.0)
        return position, velocity, (position >= self.goal_position) & (velocity >= self.goal_velocity)

    def _arrive(
        self,
        state: MountainCarState,
        position: torch.Tensor,
        velocity: torch.Tensor,
        reward: torch.Tensor,
        terminated: torch.Tensor,
    ) -> tuple[MountainCarState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        step_count = state.step_count + 1
        episode_reward = state.episode_reward + reward
        next_state = state._replace(
            position=position, velocity=velocity, step_count=step_count, episode_reward=episode_reward
        )
        return next_state, self.observe(next_state), reward, terminated, step_count >= self.max_steps

    @staticmethod
    def reset(seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> MountainCarState:
        """Start an episode: at rest, the position uniform in [-0.6, -0.4], a hash of the three counters.

        Args:
            seed: int64 ``[N]``, the seed of the batch.
            index: int64 ``[N]``, the place of each environment in the batch.
            episode: int64 ``[N]``, the number of the episode to start, counted from 0.

        Returns:
            The state at the start, each field of the counters' shape.
        """
        low, high = _START
        (share,) = uniform(seed, index, episode, streams=1).unbind()
        position = low + (high - low) * share
        return episode_start(
            MountainCarState, seed, index, episode, position=position, velocity=torch.zeros_like(position)
        )

    @staticmethod
    def observe(state: MountainCarState) -> torch.Tensor:
        """Position and velocity, float32 ``[N, 2]``."""
        return torch.stack((state.position, state.velocity), -1)

    @property
    def limits(self) -> Limits:
        """Where an episode stays: what position and velocity are clipped to."""
        return self._limits(actions=3, reward=(-1.0, 0.0))

    def _limits(self, actions: int | tuple[tuple[float, float], ...], reward: tuple[float, float]) -> Limits:
        state = {"position": (self.min_position, self.max_position), "velocity": (-self.max_speed, self.max_speed)}
        return Limits(
            actions=actions, observation=tuple(state.values()), state=state, reward=reward, max_steps=self.max_steps
        )


@dataclass(frozen=True, kw_only=True)
class MountainCarContinuousDynamics(MountainCarDynamics):
    """The constants of `MountainCarContinuousEnv`, by default Gymnasium's, and its pure functions of tensors.

    Raises:
        ValueError: If a constant is outside the range in which the environment makes sense.
    """

    force: float = 0.0015
    """By how much a full push changes the velocity in one step, m per step²."""
    goal_position: float = 0.45
    """The episode terminates where the car gets as far as this, m, and is at least as fast as ``goal_velocity``."""
    goal_reward: float = 100.0
    """What reaching the goal pays."""
    action_cost: float = 0.1
    """What a full push costs; the cost grows with the square of the push."""
    max_steps: int = 999
    """The episode is truncated after this many steps."""

    def __post_init__(self) -> None:
        """Refuse constants that make no environment."""
        super().__post_init__()
        requirements = {f"{name} must be >= 0": getattr(self, name) >= 0 for name in ("goal_reward", "action_cost")}
        refuse_unless(self, "MountainCarContinuousEnv", requirements)

    def step(
        self, state: MountainCarState, action: torch.Tensor
    ) -> tuple[MountainCarState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance by one step of semi-implicit Euler: velocity first, then position from the new velocity.

        Args:
            state: The state before the step.
            action: float32 ``[N, 1]``, the push. The force is clipped to that of ±1, the cost is not.

        Returns:
            The next state, the next observation (float32 ``[N, 2]``), the reward (float32 ``[N]``: minus the cost of
            the push, and what the goal pays), ``terminated`` and ``truncated`` (bool ``[N]``).
        """
        push = action.squeeze(-1)
        position, velocity, terminated = self._move(state, push.clamp(-1.0, 1.0))
        reward = terminated * self.goal_reward - self.action_cost * push.square()
        return self._arrive(state, position, velocity, reward, terminated)

    @property
    def limits(self) -> Limits:
        """Where an episode stays: what position and velocity are clipped to."""
        return self._limits(actions=((-1.0, 1.0),), reward=(-self.action_cost, self.goal_reward))


class MountainCarEnv(NativeEnv):
    """Rock a car out of a valley with an engine too weak to climb: Gymnasium's MountainCar-v0, native and batched.

    One step equals Gymnasium's up to the rounding of float32 (Gymnasium computes in float64), and so do the rewards and
    the ends of episodes; the start states have the same distribution. Solved: mean return ≥ -110.

    Its TensorDicts are described in `NativeEnv`. ``observation`` is ``[N, 2]``: position (m) and velocity (m per step);
    ``action`` is 0 (push left), 1 (no push) or 2 (push right); every step pays -1, the last one too; an episode is
    terminated at 0.5 m, unless the car is slower than ``goal_velocity``, and truncated after 200 steps.

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of `MountainCarDynamics`: ``force``, ``gravity``, ``min_position``, ``max_position``,
            ``max_speed``, ``goal_position``, ``goal_velocity``, ``max_steps``.

    Raises:
        ValueError: If ``num_envs`` is not positive or a constant is out of range.
        TypeError: If a constant is unknown.

    Example:
        >>> env = MountainCarEnv(num_envs=4, seed=0)
        >>> env.rollout(5)["next", "observation"].shape
        torch.Size([4, 5, 2])
    """

    state_type = MountainCarState
    dynamics_type = MountainCarDynamics
    dynamics: MountainCarDynamics


class MountainCarContinuousEnv(NativeEnv):
    """`MountainCarEnv` with a continuous push: Gymnasium's MountainCarContinuous-v0, native and batched.

    One step equals Gymnasium's up to the rounding of float32, and so do the rewards and the ends of episodes; the start
    states have the same distribution. Solved: mean return ≥ 90.

    Its TensorDicts are described in `NativeEnv`. ``observation`` is ``[N, 2]``: position (m) and velocity (m per step);
    ``action`` is the push, ``[N, 1]``, within ±1. A step costs ``0.1 action²``, and pays 100 where it reaches the goal:
    an episode is terminated at 0.45 m, unless the car is slower than ``goal_velocity``, and truncated after 999 steps.
    A larger push is clipped to ±1, but, as with Gymnasium, it costs what it was: more than the reward's spec knows.

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of `MountainCarContinuousDynamics`: those of `MountainCarDynamics`, ``goal_reward`` and
            ``action_cost``.

    Raises:
        ValueError: If ``num_envs`` is not positive or a constant is out of range.
        TypeError: If a constant is unknown.

    Example:
        >>> env = MountainCarContinuousEnv(num_envs=4, seed=0)
        >>> env.rollout(5)["next", "observation"].shape
        torch.Size([4, 5, 2])
    """

    state_type = MountainCarState
    dynamics_type = MountainCarContinuousDynamics
    dynamics: MountainCarContinuousDynamics
