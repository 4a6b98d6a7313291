"""`JointClipPPOLoss`: proximal policy optimisation on minibatches, with one pass of a shared encoder."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import LossModule

from fp8rl_torchrl.objectives.joint_model import JointModel, entropy_of


class JointClipPPOLoss(LossModule):
    r"""Proximal policy optimisation with a clipped ratio (Schulman et al., 2017, equation 7) on a batch of steps.

    With :math:`r = \pi(a|s) / \mu(a|s)`, :math:`\mu` the policy that collected,

    .. math::
        L_\text{actor} &= -\min\big(r \hat A,\; \operatorname{clip}(r, 1 - \epsilon, 1 + \epsilon)\,\hat A\big) \\
        L_\text{critic} &= c_V\,\tfrac12\,(V(s) - \hat R)^2 \\
        L_\text{entropy} &= -c_H\,\mathcal{H}[\pi(\cdot|s)]

    The batch brings the advantages :math:`\hat A` and targets :math:`\hat R` that `RolloutAdvantage`, or TorchRL's
    ``GAE``, wrote. TorchRL's `ClipPPOLoss` runs a shared encoder twice; here it runs once. The ratio and the losses
    are float32, whatever precision the networks ran in.

    Args:
        actor_critic: A model as `JointModel` describes it, such as `fp8rl_torchrl.ActorCritic`.
        clip_epsilon: :math:`\epsilon`.
        critic_coeff: :math:`c_V`.
        entropy_coeff: :math:`c_H`.
        normalize_advantage: Whether the batch's advantages are shifted and scaled to mean 0 and standard deviation 1.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from fp8rl_torchrl import ActorCritic, envs
        >>> env = envs.CustomEnv(num_envs=4, seed=0)
        >>> agent = ActorCritic.for_env(env)
        >>> from fp8rl_torchrl.objectives import RolloutAdvantage
        >>> rollout = RolloutAdvantage(agent)(env.rollout(8, agent.policy).detach())
        >>> round(JointClipPPOLoss(agent)(rollout.reshape(-1))["clip_fraction"].item())
        0
    """

    clip_epsilon: torch.Tensor

    def __init__(
        self,
        actor_critic: JointModel,
        *,
        clip_epsilon: float = 0.2,
        critic_coeff: float = 0.5,
        entropy_coeff: float = 0.01,
        normalize_advantage: bool = True,
    ) -> None:
        super().__init__()
        if not clip_epsilon > 0:
            raise ValueError(f"clip_epsilon must be > 0; got {clip_epsilon}")
        if not (critic_coeff >= 0 and entropy_coeff >= 0):
            raise ValueError(f"coefficients must be >= 0; got {critic_coeff=}, {entropy_coeff=}")
        self.actor_critic = actor_critic
        # A tensor, so that it can be annealed while the loss is compiled.
        device = next((parameter.device for parameter in self.parameters()), None)
        self.register_buffer("clip_epsilon", torch.tensor(float(clip_epsilon), device=device))
        self.critic_coeff, self.entropy_coeff = critic_coeff, entropy_coeff
        self.normalize_advantage = normalize_advantage
        self.in_keys: list[Any] = [*actor_critic.value.in_keys, "action", "action_log_prob", "advantage"]
        self.in_keys.append("value_target")
        self.out_keys = ["loss_actor", "loss_critic", "loss_entropy", "entropy", "kl", "clip_fraction"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the losses of a batch of steps.

        Args:
            tensordict: Batch ``[B]`` with the observation, ``action``, ``action_log_prob`` (float32 ``[B]``, the
                collecting policy's), ``advantage`` and ``value_target`` (float32 ``[B, 1]``).

        Returns:
            Float32 scalars: ``loss_actor``, ``loss_critic``, ``loss_entropy`` and, for logging, ``entropy`` (nats),
            ``kl`` (nats, from the collecting policy, estimated by the mean of r - 1 - log r) and ``clip_fraction``.

        Raises:
            KeyError: If an entry is missing.
        """
        distribution, value = self.actor_critic.distribution_and_value(tensordict)
        log_ratio = distribution.log_prob(tensordict["action"]).float() - tensordict["action_log_prob"]
        ratio = log_ratio.exp()
        advantage = tensordict["advantage"].squeeze(-1)
        if self.normalize_advantage:
            advantage = (advantage - advantage.mean()) / advantage.std().clamp(min=1e-6)
        clipped = ratio.clamp(1 - self.clip_epsilon, 1 + self.clip_epsilon)
        entropy = entropy_of(distribution).mean()
        with torch.no_grad():
            kl = (ratio - 1 - log_ratio).mean()
            clip_fraction = ((ratio - 1).abs() > self.clip_epsilon).float().mean()
        return TensorDict(
            {
                "loss_actor": -torch.minimum(ratio * advantage, clipped * advantage).mean(),
                "loss_critic": self.critic_coeff * 0.5 * (value.float() - tensordict["value_target"]).square().mean(),
                "loss_entropy": -self.entropy_coeff * entropy,
                "entropy": entropy.detach(),
                "kl": kl,
                "clip_fraction": clip_fraction,
            },
            batch_size=[],
        )
