"""How far the learner's policy is from the one that collected, at the same weights, because of their precisions."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from fp8rl_torchrl.precision.mode import Precision


@torch.no_grad()
def rollout_gap(policy: Any, rollout: TensorDictBase, precision: Precision) -> dict[str, float]:
    r"""Compare the stored log-probabilities with the learner's, before any update changes its weights.

    With :math:`r = \pi_\text{learner}(a|s) / \pi_\text{rollout}(a|s)` for each collected action, the divergence
    :math:`\mathrm{KL}(\pi_\text{rollout} \| \pi_\text{learner})` is estimated by the mean of :math:`r - 1 - \log r`,
    which is unbiased and never negative (Schulman, "Approximating KL divergence", 2020).

    Args:
        policy: The learner's policy; must offer ``get_dist``.
        rollout: What was just collected, ``[N, T]``, with ``action`` and ``action_log_prob``.
        precision: The learner's precision.

    Returns:
        ``rollout_kl`` in nats and ``rollout_ratio_error``, the largest :math:`|r - 1|`; empty if the policy has no
        distribution or its log-probabilities were not stored.
    """
    if not hasattr(policy, "get_dist") or "action_log_prob" not in rollout.keys():
        return {}
    with precision.autocast(rollout["action_log_prob"].device):
        log_prob = policy.get_dist(rollout.select(*policy.in_keys)).log_prob(rollout["action"])
    log_ratio = log_prob.float() - rollout["action_log_prob"]
    over = log_ratio.expm1()
    kl, error = torch.stack([(over - log_ratio).mean(), over.abs().max()]).tolist()
    return {"rollout_kl": kl, "rollout_ratio_error": error}
