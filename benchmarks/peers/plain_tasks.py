"""The tasks as plain functions of tensors, for `torch_compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Task(NamedTuple):
    """One environment's rules; the observation is the state ``[N, size]``."""

    size: int
    max_steps: int
    """Steps after which an episode is truncated."""
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """The next state, the reward and ``terminated``, of a state and actions ``[N]`` (1.0 or 0.0)."""
    start: Callable[[Tensor], Tensor]
    """The start states of noise ``[N, size]``, uniform in [0, 1)."""


def custom_step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CustomEnv: semi-implicit Euler, with its default constants."""
    position, velocity = state.unbind(-1)
    velocity = velocity + ((2 * action - 1) - 0.1 * velocity) * 0.1
    position = position + velocity * 0.1
    reward = 0.1 + (1 - position.abs() / 2.4)
    return torch.stack((position, velocity), -1), reward, position.abs() > 2.4


def custom_start(noise: Tensor) -> Tensor:
    """Position uniform in ±0.5, velocity in ±0.05."""
    return (2 * noise - 1) * torch.tensor([0.5, 0.05], dtype=noise.dtype)


def cartpole_step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CartPole-v1: explicit Euler, as Gymnasium's (Barto, Sutton and Anderson, 1983, without friction)."""
    gravity, pole_mass, total_mass, half_length, force, tau = 9.8, 0.1, 1.1, 0.5, 10.0, 0.02
    position, velocity, angle, rotation = state.unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    push = (2 * action - 1) * force
    pull = (push + pole_mass * half_length * rotation.square() * sine) / total_mass
    angular = (gravity * sine - cosine * pull) / (half_length * (4 / 3 - pole_mass * cosine.square() / total_mass))
    linear = pull - pole_mass * half_length * angular * cosine / total_mass
    position, velocity = position + tau * velocity, velocity + tau * linear
    angle, rotation = angle + tau * rotation, rotation + tau * angular
    terminated = (position.abs() > 2.4) | (angle.abs() > 12 * 2 * math.pi / 360)
    return torch.stack((position, velocity, angle, rotation), -1), torch.ones_like(position), terminated


def cartpole_start(noise: Tensor) -> Tensor:
    """Everything uniform in ±0.05."""
    return (2 * noise - 1) * 0.05


TASKS = {
    "customenv": Task(2, 200, custom_step, custom_start),
    "cartpole": Task(4, 500, cartpole_step, cartpole_start),
}
