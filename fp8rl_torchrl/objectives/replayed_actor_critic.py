"""`ReplayedActorCriticLoss`: a one-step actor-critic that learns from replayed transitions."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import LossModule

from fp8rl_torchrl.objectives.joint_model import JointModel, entropy_of


class ReplayedActorCriticLoss(LossModule):
    r"""Actor-critic on single transitions that an older policy collected.

    A sample from a replay buffer was drawn by a behaviour policy :math:`\mu`, not by the current policy :math:`\pi`, so
    the plain policy gradient of the sample is biased. With the behaviour's log-probability stored beside the action,
    each transition :math:`(s, a, r, s')` is weighted by the truncated importance weight

    .. math:: \rho = \min(\bar\rho,\; \pi(a|s) / \mu(a|s))

    and contributes, with :math:`d = 1` where the episode *terminated* (a truncated one is bootstrapped through),

    .. math::
        \delta &= r + \gamma\,(1 - d)\,V(s') - V(s) \\
        L_\text{actor} &= -\rho\,\delta\,\log \pi(a|s)
            &&\text{gradient through } \log\pi \text{ only} \\
        L_\text{critic} &= c_V\,\rho\,\tfrac12\,\delta^2
            &&\text{gradient through } V(s) \text{ only} \\
        L_\text{entropy} &= -c_H\,\mathcal{H}[\pi(\cdot|s)]

    This is V-trace at horizon 1 (Espeholt et al., "IMPALA", 2018, section 4: with one step its target is
    :math:`V(s) + \rho\,\delta`), on the replayed samples and weights of Degris, White and Sutton, "Off-Policy
    Actor-Critic", 2012. Truncation bounds the variance; it biases the gradient only where
    :math:`\pi/\mu > \bar\rho`.

    The ratio, :math:`\delta` and the losses are float32, whatever precision the networks ran in.

    Args:
        actor_critic: A model as `JointModel` describes it, such as `fp8rl_torchrl.ActorCritic`.
        gamma: Discount, in ``[0, 1]``.
        max_weight: :math:`\bar\rho`; ``float("inf")`` never truncates.
        critic_coeff: :math:`c_V`.
        entropy_coeff: :math:`c_H`; where it is 0 there is no ``loss_entropy``.

    Raises:
        ValueError: If a coefficient is out of range.

    Example:
        >>> from fp8rl_torchrl import ActorCritic, envs
        >>> env = envs.CustomEnv(num_envs=4, seed=0)
        >>> agent = ActorCritic.for_env(env)
        >>> loss = ReplayedActorCriticLoss(agent)
        >>> losses = loss(env.rollout(8, agent.policy).flatten().detach())
        >>> [key for key in losses.keys() if key.startswith("loss_")]
        ['loss_actor', 'loss_critic', 'loss_entropy']
    """

    def __init__(
        self,
        actor_critic: JointModel,
        *,
        gamma: float = 0.99,
        max_weight: float = 1.0,
        critic_coeff: float = 0.5,
        entropy_coeff: float = 0.01,
    ) -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1]; got {gamma}")
        if not max_weight > 0:
            raise ValueError(f"max_weight must be > 0; got {max_weight}")
        if min(critic_coeff, entropy_coeff) < 0:
            raise ValueError(f"coefficients must be >= 0; got {critic_coeff=}, {entropy_coeff=}")
        self.actor_critic = actor_critic
        self.gamma = gamma
        self.max_weight = max_weight
        self.critic_coeff = critic_coeff
        self.entropy_coeff = entropy_coeff
        observed = actor_critic.value.in_keys
        stored = ["action", "action_log_prob", ("next", "reward"), ("next", "terminated")]
        self.in_keys: list[Any] = [*observed, *(("next", key) for key in observed), *stored]
        losses = ["loss_actor", "loss_critic", *(["loss_entropy"] if entropy_coeff else [])]
        self.out_keys = [*losses, "entropy", "importance_weight", "td_error"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the losses of a batch of transitions.

        Args:
            tensordict: Batch ``[B]`` with the observation, ``action``, ``action_log_prob`` (float32 ``[B]``, the
                behaviour policy's) and, under ``next``, the observation, ``reward`` (``[B, 1]``) and ``terminated``
                (bool ``[B, 1]``).

        Returns:
            Float32 scalars: ``loss_actor``, ``loss_critic``, ``loss_entropy`` and, for logging, ``entropy`` (nats),
            ``importance_weight`` (mean, before truncation) and ``td_error`` (mean absolute).

        Raises:
            KeyError: If an entry is missing.
        """
        following: Any = tensordict["next"]
        with torch.no_grad():
            next_value = self.actor_critic.state_value(following).float()
            going_on = ~following["terminated"]
            target = following["reward"].float() + self.gamma * going_on * next_value
        distribution, value = self.actor_critic.distribution_and_value(tensordict)
        log_prob = distribution.log_prob(tensordict["action"]).float()
        td_error = (target - value.float()).squeeze(-1)

        ratio = (log_prob.detach() - tensordict["action_log_prob"]).exp()
        weight = ratio.clamp(max=self.max_weight)
        entropy = entropy_of(distribution).mean()
        losses = TensorDict(
            {
                "loss_actor": -(weight * td_error.detach() * log_prob).mean(),
                "loss_critic": self.critic_coeff * 0.5 * (weight * td_error.square()).mean(),
                "entropy": entropy.detach(),
                "importance_weight": ratio.mean(),
                "td_error": td_error.detach().abs().mean(),
            },
            batch_size=[],
        )
        return losses.set("loss_entropy", -self.entropy_coeff * entropy) if self.entropy_coeff else losses
