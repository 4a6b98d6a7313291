"""`DriftEnv`: a native environment of a user's making, with a continuous action and views in its observation."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fp8rl_torchrl.envs import NativeEnv
from fp8rl_torchrl.envs.native import Limits
from fp8rl_torchrl.envs.noise import uniform


class DriftState(NamedTuple):
    place: torch.Tensor
    wind: torch.Tensor  # of the whole episode: a step passes it on as it is
    step_count: torch.Tensor
    episode_reward: torch.Tensor
    seed: torch.Tensor
    index: torch.Tensor
    episode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DriftDynamics:
    """Steer against the wind; a continuous action, and an observation of one number."""

    max_steps: int = 9

    def step(self, state, action):
        place = state.place + action.squeeze(-1).clamp(-1, 1) + state.wind
        reward = -place.abs().clamp(max=6)
        count = state.step_count + 1
        state = state._replace(place=place, step_count=count, episode_reward=state.episode_reward + reward)
        return state, self.observe(state), reward, place.abs() > 4, count >= self.max_steps

    @staticmethod
    def reset(seed, index, episode):
        place, wind = (2 * uniform(seed, index, episode, streams=2) - 1).unbind()
        return DriftState(place, wind, torch.zeros_like(index), torch.zeros_like(place), seed, index, episode)

    @staticmethod
    def observe(state):
        return state.place.unsqueeze(-1)  # a view: the environment sees to it that no memory is shared

    @property
    def limits(self):
        state, place = {"place": (-6.0, 6.0), "wind": (-1.0, 1.0)}, ((-6.0, 6.0),)
        return Limits(
            actions=((-1.0, 1.0),), observation=place, state=state, reward=(-6.0, 0.0), max_steps=self.max_steps
        )


class DriftEnv(NativeEnv):
    state_type = DriftState
    dynamics_type = DriftDynamics
