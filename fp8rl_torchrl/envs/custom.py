"""`CustomEnv`: push a mass towards a target, as a native, batched TorchRL environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fp8rl_torchrl.envs.custom_constants import START_POSITION, START_VELOCITY, CustomConstants
from fp8rl_torchrl.envs.native import Limits, NativeEnv, episode_start
from fp8rl_torchrl.envs.noise import uniform


class CustomState(NamedTuple):
    """All that one step needs, each of shape ``[N]`` (or ``[]``).

    ``position`` and ``velocity`` (float32) are the physics, ``step_count`` (int64) and ``episode_reward`` (float32)
    the episode so far, and ``seed``, ``index``, ``episode`` (int64) the counters that the start noise is hashed from.
    """

    position: torch.Tensor
    velocity: torch.Tensor
    step_count: torch.Tensor
    episode_reward: torch.Tensor
    seed: torch.Tensor
    index: torch.Tensor
    episode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CustomDynamics(CustomConstants):
    """The constants of `CustomEnv` and its pure functions of tensors."""

    def step(
        self, state: CustomState, action: torch.Tensor
    ) -> tuple[CustomState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance by one step of semi-implicit Euler: velocity first, then position from the new velocity.

        Args:
            state: The state before the step.
            action: int64 ``[N]``, 0 (left) or 1 (right).

        Returns:
            The next state, the next observation (float32 ``[N, 2]``: position, velocity), the reward (float32
            ``[N]``), ``terminated`` and ``truncated`` (bool ``[N]``).
        """
        push = torch.where(action == 1, self.force, -self.force)
        velocity = state.velocity + (push - self.friction * state.velocity) * self.dt
        position = state.position + velocity * self.dt
        reward = self.survival_reward + (1.0 - (position - self.target).abs() / self.bound)
        step_count = state.step_count + 1
        next_state = state._replace(
            position=position,
            velocity=velocity,
            step_count=step_count,
            episode_reward=state.episode_reward + reward,
        )
        terminated = position.abs() > self.bound
        truncated = step_count >= self.max_steps
        return next_state, self.observe(next_state), reward, terminated, truncated

    @staticmethod
    def reset(seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> CustomState:
        """Start an episode: position uniform in ±0.5, velocity uniform in ±0.05, both a hash of the three counters.

        Args:
            seed: int64 ``[N]``, the seed of the batch.
            index: int64 ``[N]``, the place of each environment in the batch.
            episode: int64 ``[N]``, the number of the episode to start, counted from 0.

        Returns:
            The state at the start, each field of the counters' shape.
        """
        place, speed = uniform(seed, index, episode, streams=2).unbind()
        position, velocity = (2 * place - 1) * START_POSITION, (2 * speed - 1) * START_VELOCITY
        return episode_start(CustomState, seed, index, episode, position=position, velocity=velocity)

    @staticmethod
    def observe(state: CustomState) -> torch.Tensor:
        """Position and velocity, float32 ``[N, 2]``."""
        return torch.stack((state.position, state.velocity), -1)

    @property
    def limits(self) -> Limits:
        """Where an episode stays."""
        position, velocity = (-self.max_position, self.max_position), (-self.max_velocity, self.max_velocity)
        return Limits(
            actions=2,
            observation=(position, velocity),
            state={"position": position, "velocity": velocity},
            reward=self.reward_range,
            max_steps=self.max_steps,
        )


class CustomEnv(NativeEnv):
    """Push a mass left or right so that it stays near a target; 200 steps, ceiling of the return 220.

    Uniformly random actions return 73.5 on average, a hand-made bang-bang controller 219.05.

    Every TensorDict carries the whole state, so a step is a function of the TensorDict alone: an episode can be saved,
    restored and branched by keeping TensorDicts. Start states are hashed from (seed, index, episode number), hence the
    same in eager, compiled and captured runs, and resetting one environment never disturbs another.

    | key | shape | dtype | |
    |---|---|---|---|
    | ``observation`` | ``[N, 2]`` | float32 | position, velocity |
    | ``action`` | ``[N]`` | int64 | categorical: 0 pushes left, 1 pushes right |
    | ``reward`` | ``[N, 1]`` | float32 | ``survival_reward + (1 - abs(x - target) / bound)``, from the new position |
    | ``terminated`` / ``truncated`` / ``done`` | ``[N, 1]`` | bool | beyond the bound / step limit / either |
    | ``step_count``, ``episode_reward`` | ``[N, 1]`` | int64, float32 | of the running episode |
    | ``state`` | ``[N]`` | | position, velocity, and the counters of the start noise |

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of `CustomConstants`: ``dt``, ``force``, ``friction``, ``bound``, ``target``,
            ``survival_reward``, ``max_steps``.

    Raises:
        ValueError: If ``num_envs`` is not positive or a constant is out of range.
        TypeError: If a constant is unknown.

    Example:
        >>> env = CustomEnv(num_envs=4, seed=0)
        >>> env.rollout(5)["next", "reward"].shape
        torch.Size([4, 5, 1])
    """

    state_type = CustomState
    dynamics_type = CustomDynamics
    dynamics: CustomDynamics
