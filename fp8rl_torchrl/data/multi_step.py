"""`n_step`: transitions that span several steps, so that rewards are known sooner to the values before them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase


def n_step(rollout: TensorDictBase, steps: int, gamma: float) -> TensorDictBase:
    r"""Turn the steps of a rollout into transitions over up to ``steps`` steps.

    .. math:: R_t = \sum_{k=0}^{m-1} \gamma^k r_{t+k}, \qquad s'_t = s_{t+m}

    with :math:`m` the largest number of steps up to ``steps`` that stays within the episode and the rollout. Everything
    under ``next``, the flags too, is that of the last of these steps, and ``steps_to_next_obs`` is :math:`m`:
    TorchRL's value estimators discount what comes after it by :math:`\gamma^m`. (`torchrl.data.MultiStep` leaves the
    flags those of the first step, so that a value is added after a termination.)

    Args:
        rollout: ``[N, T]``, or ``[T]`` of a single environment with its dimension named "time" as TorchRL does. It
            holds ``("next", "reward")`` and ``("next", "done")``, each ``[N, T, 1]``.
        steps: How many steps, at least 1.
        gamma: Discount per step.

    Returns:
        A TensorDict ``[N, T]`` with the entries of the rollout and ``steps_to_next_obs`` (int64 ``[N, T, 1]``).

    Raises:
        ValueError: If ``steps`` is below 1, ``gamma`` out of range, or the rollout is flattened: rewards would
            then be summed across environments.

    Example:
        >>> from fp8rl_torchrl.envs import CustomEnv
        >>> rollout = n_step(CustomEnv(num_envs=2, seed=0).rollout(5), 3, 0.99)
        >>> rollout["steps_to_next_obs"][0, :, 0].tolist()
        [3, 3, 3, 2, 1]
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1; got {steps}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1]; got {gamma}")
    if rollout.batch_dims == 1 and rollout.names[0] != "time":
        raise ValueError(
            f"n_step needs a rollout [N, T] as it was collected, but this one is flat ({rollout.batch_size[0]} steps): "
            'call it before reshape; a rollout of a single environment has names=["time"]'
        )
    following: Any = rollout["next"]
    reward, done = following["reward"].squeeze(-1), following["done"].squeeze(-1)
    length = reward.shape[-1]
    total, running = reward.clone(), ~done
    last = torch.arange(length, device=reward.device).expand(reward.shape).clone()
    for ahead in range(1, min(steps, length)):
        goes_on = running[..., :-ahead]
        total[..., :-ahead] += gamma**ahead * torch.where(goes_on, reward[..., ahead:], 0.0)
        last[..., :-ahead] += goes_on
        running[..., :-ahead] &= ~done[..., ahead:]
        running[..., -ahead:] = False
    first = torch.arange(length, device=reward.device)
    spanned = following.gather(-1, last).set("reward", total.unsqueeze(-1))
    return rollout.copy().set("next", spanned).set("steps_to_next_obs", (last - first + 1).unsqueeze(-1))
