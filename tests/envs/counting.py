"""Gymnasium environments whose observations tell where they come from, and what a collector makes of them."""

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torchrl.collectors import Collector

BOX = spaces.Box(0, 1000, (1,), np.float32)


class Count(gymnasium.Env):
    """Observes 100 * episode + step, episodes counted from 1, so that every observation tells where it comes from."""

    observation_space = BOX
    action_space = spaces.Discrete(2)

    def __init__(self, length=3, truncates=False):
        self.length, self.truncates, self.episode = length, truncates, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self.step_count += 1
        over = self.step_count >= self.length
        return self._observe(), 1.0, over and not self.truncates, over and self.truncates, {}

    def _observe(self):
        return np.array([100 * self.episode + self.step_count], dtype=np.float32)


class Spaces(gymnasium.Env):
    """Random observations of any space; remembers the actions it was given."""

    def __init__(self, observation=BOX, action=None):
        self.observation_space = observation
        self.action_space = spaces.Discrete(2) if action is None else action
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.actions.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


class Reuses(Count):
    """Writes every observation into the same array."""

    def __init__(self):
        super().__init__(length=100)
        self.buffer = np.zeros(1, dtype=np.float32)

    def _observe(self):
        self.buffer[:] = super()._observe()
        return self.buffer


def collect(env, frames, batches=1):
    """Batches of transitions ``[N, T]`` of a TorchRL collector with random actions, joined along time."""
    collector = Collector(env, None, frames_per_batch=frames, total_frames=frames * batches)
    data = torch.cat([batch.clone() for batch in collector], -1)
    collector.shutdown(close_env=False)
    return data


def column(data, *key):
    return data[key].squeeze(-1).tolist()
