"""`ReturnsToGo`: what REINFORCE learns from, the discounted return of every step to the end of its episode."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from fp8rl_torchrl.objectives.advantages import generalized_advantage, time_major
from fp8rl_torchrl.objectives.joint_model import JointModel


class ReturnsToGo(nn.Module):
    r"""Writes the advantages and value targets of REINFORCE (Williams, 1992) into a rollout ``[N, T]``.

    .. math:: G_t = r_t + \gamma\,G_{t+1}

    up to the end of the episode, terminated or truncated. A step whose episode goes on past the rollout has no return
    yet: its advantage is 0, and the other advantages are scaled up so that a mean over all steps is the mean over those
    that have one. Let each rollout begin with new episodes and last as long as the longest, and few steps are lost.

    Args:
        actor_critic: A model as `JointModel` describes it.
        gamma: Discount per step.
        baseline: Whether the state's value is taken off the return.
        normalize: Whether advantages are shifted and scaled to mean 0 and standard deviation 1.

    Raises:
        ValueError: If ``gamma`` is out of range.

    Example:
        >>> from fp8rl_torchrl import ActorCritic, envs
        >>> env = envs.CustomEnv(num_envs=4, seed=0)
        >>> agent = ActorCritic.for_env(env)
        >>> rollout = ReturnsToGo(agent)(env.rollout(200, agent.policy, break_when_any_done=False))
        >>> rollout["advantage"].shape, rollout["value_target"].shape
        (torch.Size([4, 200, 1]), torch.Size([4, 200, 1]))
    """

    actor_critic: JointModel

    def __init__(
        self, actor_critic: JointModel, *, gamma: float = 0.99, baseline: bool = False, normalize: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1]; got {gamma}")
        # The loss owns the networks; a second path to them would give every parameter two names.
        self.__dict__["actor_critic"] = actor_critic
        self.gamma, self.baseline, self.normalize = gamma, baseline, normalize
        self.in_keys: list[Any] = [*actor_critic.value.in_keys, ("next", "reward"), ("next", "done")]

    @torch.no_grad()
    def forward(self, rollout: TensorDictBase) -> TensorDictBase:
        """Write ``advantage`` and ``value_target`` (float32 ``[N, T, 1]``) into a rollout ``[N, T]``.

        Returns:
            The same rollout.
        """
        reward, done = (entry.squeeze(-1) for entry in time_major(rollout, ("next", "reward"), ("next", "done")))
        zero = torch.zeros_like(reward, dtype=torch.float32)
        # With no values and no decay of the trace, the sum of errors is the sum of rewards.
        returns = generalized_advantage(reward.float(), zero, zero, done, done, gamma=self.gamma, lmbda=1.0)
        ended = done.flip(0).cumsum(0).flip(0) > 0
        value = zero
        if self.baseline:
            rows = rollout.select(*self.actor_critic.value.in_keys)
            value = self.actor_critic.state_value(rows).float().reshape(*rollout.shape).movedim(-1, 0)
            value = value.reshape(returns.shape)
        advantage, known = returns - value, ended.sum().clamp(min=1)
        if self.normalize:
            mean = torch.where(ended, advantage, 0.0).sum() / known
            variance = torch.where(ended, (advantage - mean).square(), 0.0).sum() / known
            advantage = (advantage - mean) / variance.sqrt().clamp(min=1e-6)
        advantage = torch.where(ended, advantage, 0.0) * (ended.numel() / known)
        target = torch.where(ended, returns, value)
        for name, entry in (("advantage", advantage), ("value_target", target)):
            rollout.set(name, entry.transpose(0, 1).reshape(*rollout.shape, 1))
        return rollout
