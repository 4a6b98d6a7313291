r"""Values and advantages of a whole rollout, from one pass of the critic; tensors in, tensors out.

Everything here is **time-major**, ``[T, N]``: step by step in memory, as a fused collection leaves it.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from fp8rl_torchrl.objectives.joint_model import JointModel


def generalized_advantage(
    reward: torch.Tensor,
    value: torch.Tensor,
    next_value: torch.Tensor,
    terminated: torch.Tensor,
    done: torch.Tensor,
    *,
    gamma: float,
    lmbda: float,
) -> torch.Tensor:
    r"""Generalised advantage estimation (Schulman et al., 2016, equation 16) of each step.

    .. math::
        \delta_t &= r_t + \gamma\,(1 - \text{terminated}_t)\,V(s_{t+1}) - V(s_t) \\
        A_t &= \delta_t + \gamma\lambda\,(1 - \text{done}_t)\,A_{t+1}

    Args:
        reward: float32 ``[T, N]``.
        value: float32 ``[T, N]``, of the observation before the step.
        next_value: float32 ``[T, N]``, of the true observation after it, also where an episode ended.
        terminated: bool ``[T, N]``; no value is added after a termination.
        done: bool ``[T, N]``; no advantage is carried over an episode's end.
        gamma: Discount per step.
        lmbda: The trace parameter :math:`\lambda`.

    Returns:
        float32 ``[T, N]``.
    """
    delta = reward + gamma * next_value * ~terminated - value
    carried = gamma * lmbda * ~done
    advantage = torch.zeros_like(reward[0])
    advantages = []
    for step in reversed(range(len(reward))):
        advantage = delta[step] + carried[step] * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def last_observations(
    next_observation: torch.Tensor, truncated: torch.Tensor, episode_ends: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The observations after which a value is needed that no step of the rollout begins with.

    The value after a step is the value before the next one, except after the last step and after a truncated one, where
    the next step begins another episode. Only those few are worth another pass of the critic.

    Args:
        next_observation: ``[T, N, ...]``, the true observation after each step.
        truncated: bool ``[T, N]``.
        episode_ends: The largest number of truncated steps that one environment can have in a rollout.

    Returns:
        ``[1 + episode_ends, N, ...]``: the last observation of the rollout, then those after the first, second, ...
        truncated step of each environment (some other observation where there is none); and the number of each
        truncated step among its environment's, int64 ``[T, N]``, counted from 1.
    """
    number = truncated.long().cumsum(0)
    steps, columns = (torch.arange(length, device=truncated.device) for length in truncated.shape)
    found = [next_observation[-1]]
    for k in range(1, episode_ends + 1):
        # The one step where this holds: a sum finds it as `argmax` does, and is vectorised.
        step = torch.where(truncated & (number == k), steps.unsqueeze(-1), 0).sum(0)
        found.append(next_observation[step, columns])
    return torch.stack(found), number


def values_after(
    value: torch.Tensor, last: torch.Tensor, truncated: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """The value of the observation after each step, put together from values that are known.

    Args:
        value: float32 ``[T, N]``, of the observation before each step.
        last: float32 ``[1 + episode_ends, N]``, of what `last_observations` returned.
        truncated: bool ``[T, N]``.
        number: As `last_observations` returned it.

    Returns:
        float32 ``[T, N]``; NaN where an environment has more truncated steps than ``episode_ends``, so that an update
        made of them is refused.
    """
    following = torch.cat((value[1:], last[:1]))
    following = torch.where(truncated, torch.nan, following)
    for k in range(1, len(last)):
        following = torch.where(truncated & (number == k), last[k], following)
    return following


def time_major(rollout: TensorDictBase, *keys: Any) -> list[torch.Tensor]:
    """Entries of a rollout ``[N, T]`` (``[T]`` of a single environment) as tensors ``[T, N, ...]``."""
    entries = [rollout[key] for key in keys]
    return [entry.unsqueeze(1) if rollout.ndim == 1 else entry.transpose(0, 1) for entry in entries]


class RolloutAdvantage(nn.Module):
    """Advantages and value targets of whole rollouts, `generalized_advantage` over one pass of the critic.

    `torchrl.objectives.value.GAE` evaluates the critic on every next observation as well, or, with ``shifted=True``,
    gathers rows by a mask, which reads the device and cannot be compiled whole. Here the values after a step are those
    before the next one, and only the observations at the end of the rollout and of truncated episodes are evaluated
    besides.

    Args:
        actor_critic: A model as `JointModel` describes it.
        gamma: Discount per step.
        lmbda: The trace parameter of GAE; 1 gives n-step returns.
        episode_ends: The largest number of truncated steps that an environment can have within one rollout: 1 where
            no episode is shorter than the rollout. None if that is not known: then every next observation is evaluated.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from fp8rl_torchrl import ActorCritic, envs
        >>> env = envs.CustomEnv(num_envs=4, seed=0)
        >>> agent = ActorCritic.for_env(env)
        >>> rollout = RolloutAdvantage(agent, episode_ends=1)(env.rollout(8, agent.policy))
        >>> rollout["advantage"].shape, rollout["value_target"].shape
        (torch.Size([4, 8, 1]), torch.Size([4, 8, 1]))
    """

    actor_critic: JointModel

    def __init__(
        self, actor_critic: JointModel, *, gamma: float = 0.99, lmbda: float = 0.95, episode_ends: int | None = None
    ) -> None:
        super().__init__()
        if not 0 <= gamma <= 1 or not 0 <= lmbda <= 1:
            raise ValueError(f"gamma and lmbda must lie in [0, 1]; got {gamma} and {lmbda}")
        if episode_ends is not None and episode_ends < 0:
            raise ValueError(f"episode_ends must be >= 0, or None; got {episode_ends}")
        # The loss owns the networks; a second path to them would give every parameter two names.
        self.__dict__["actor_critic"] = actor_critic
        self.gamma, self.lmbda, self.episode_ends = gamma, lmbda, episode_ends
        self.observed = list(actor_critic.value.in_keys)
        self.in_keys: list[Any] = [
            *self.observed,
            *(("next", key) for key in self.observed),
            *(("next", key) for key in ("reward", "terminated", "truncated", "done")),
        ]

    def rows(self, rollout: TensorDictBase) -> TensorDict:
        """What the model observes in a rollout ``[N, T]``, as a time-major batch ``[T * N]``."""
        return self._batch(time_major(rollout, *self.observed))

    def _batch(self, entries: list[torch.Tensor]) -> TensorDict:
        flat = {key: entry.flatten(0, 1) for key, entry in zip(self.observed, entries, strict=True)}
        return TensorDict(flat, batch_size=[next(iter(flat.values())).shape[0]])

    @torch.no_grad()
    def estimate(self, rollout: TensorDictBase, value: torch.Tensor) -> torch.Tensor:
        """The advantages of a rollout whose values are known.

        Args:
            rollout: ``[N, T]`` with ``in_keys``.
            value: float32 ``[T, N]``, of the observation before each step.

        Returns:
            float32 ``[T, N]``, without gradient.
        """
        flags = ("reward", "terminated", "truncated", "done")
        found = time_major(rollout, *(("next", key) for key in flags))
        reward, terminated, truncated, done = (entry.squeeze(-1) for entry in found)
        following = time_major(rollout, *(("next", key) for key in self.observed))
        if self.episode_ends is None:
            next_value = self._value(following)
        else:
            number, last = truncated, []
            for entry in following:
                observation, number = last_observations(entry, truncated & ~terminated, self.episode_ends)
                last.append(observation)
            next_value = values_after(value, self._value(last), truncated & ~terminated, number)
        return generalized_advantage(
            reward.float(), value, next_value, terminated, done, gamma=self.gamma, lmbda=self.lmbda
        )

    def _value(self, entries: list[torch.Tensor]) -> torch.Tensor:
        value = self.actor_critic.state_value(self._batch(entries))
        return value.float().reshape(entries[0].shape[:2])

    @torch.no_grad()
    def forward(self, rollout: TensorDictBase) -> TensorDictBase:
        """Write ``advantage`` and ``value_target`` (float32 ``[N, T, 1]``) into a rollout ``[N, T]``.

        Returns:
            The same rollout.
        """
        steps = rollout.shape[-1]
        value = self.actor_critic.state_value(self.rows(rollout)).float().reshape(steps, -1)
        advantage = self.estimate(rollout, value)
        for name, entry in (("advantage", advantage), ("value_target", advantage + value)):
            rollout.set(name, entry.transpose(0, 1).reshape(*rollout.shape, 1))
        return rollout
