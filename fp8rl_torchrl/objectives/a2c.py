"""`RolloutA2CLoss`: advantage actor-critic on a whole rollout, with one pass of a shared encoder."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import LossModule

from fp8rl_torchrl.objectives.advantages import RolloutAdvantage, time_major
from fp8rl_torchrl.objectives.joint_model import JointModel, entropy_of


class RolloutA2CLoss(LossModule):
    r"""Advantage actor-critic (Mnih et al., 2016, without the asynchrony) on the rollout ``[N, T]`` of one collection.

    .. math::
        L_\text{actor} &= -\hat A_t \log \pi(a_t|s_t), \qquad
        L_\text{critic} = c_V\,\tfrac12\,(V(s_t) - \hat R_t)^2, \qquad
        L_\text{entropy} = -c_H\,\mathcal{H}[\pi(\cdot|s_t)]

    averaged over the rollout, with the advantages :math:`\hat A` and targets :math:`\hat R = \hat A + V` of
    `RolloutAdvantage`, held constant. TorchRL's `A2CLoss` and its ``GAE`` run a shared encoder three times over; here
    it runs once, and what the critic says in that pass is also what the advantages are made of.

    Distributions, advantages, targets and losses are float32, whatever precision the networks ran in.

    Args:
        actor_critic: A model as `JointModel` describes it, such as `fp8rl_torchrl.ActorCritic`.
        gamma: Discount, in ``[0, 1]``.
        lmbda: The trace parameter of GAE, in ``[0, 1]``.
        critic_coeff: :math:`c_V`.
        entropy_coeff: :math:`c_H`.
        normalize_advantage: Whether the actor's advantages are shifted and scaled to mean 0 and standard deviation 1.
        episode_ends: As in `RolloutAdvantage`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from fp8rl_torchrl import ActorCritic, envs
        >>> env = envs.CustomEnv(num_envs=4, seed=0)
        >>> agent = ActorCritic.for_env(env)
        >>> losses = RolloutA2CLoss(agent)(env.rollout(8, agent.policy).detach())
        >>> [key for key in losses.keys() if key.startswith("loss_")]
        ['loss_actor', 'loss_critic', 'loss_entropy']
    """

    def __init__(
        self,
        actor_critic: JointModel,
        *,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        critic_coeff: float = 0.5,
        entropy_coeff: float = 0.01,
        normalize_advantage: bool = False,
        episode_ends: int | None = None,
    ) -> None:
        super().__init__()
        if not (critic_coeff >= 0 and entropy_coeff >= 0):
            raise ValueError(f"coefficients must be >= 0; got {critic_coeff=}, {entropy_coeff=}")
        self.actor_critic = actor_critic
        self.advantage = RolloutAdvantage(actor_critic, gamma=gamma, lmbda=lmbda, episode_ends=episode_ends)
        self.critic_coeff, self.entropy_coeff = critic_coeff, entropy_coeff
        self.normalize_advantage = normalize_advantage
        self.in_keys: list[Any] = [*self.advantage.in_keys, "action", "action_log_prob"]
        losses, logged = ["loss_actor", "loss_critic", "loss_entropy"], ["entropy", "advantage"]
        self.out_keys = [*losses, *logged, "rollout_kl", "rollout_ratio_error"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the losses of a rollout.

        Args:
            tensordict: Batch ``[N, T]`` (``[T]`` of a single environment) with ``in_keys``: the observation,
                ``action``, ``action_log_prob`` and, under ``next``, the observation, ``reward``, ``terminated``,
                ``truncated`` and ``done`` (each ``[N, T, 1]``).

        Returns:
            Float32 scalars: ``loss_actor``, ``loss_critic``, ``loss_entropy`` and, for logging, ``entropy`` (nats),
            ``advantage`` (mean absolute), and how far this policy is from the one that collected, at what are the same
            weights: ``rollout_kl`` (nats) and ``rollout_ratio_error`` (largest).

        Raises:
            KeyError: If an entry is missing.
        """
        distribution, value = self.actor_critic.distribution_and_value(self.advantage.rows(tensordict))
        value = value.float().reshape(tensordict.shape[-1], -1)
        advantage = self.advantage.estimate(tensordict, value.detach())
        target = advantage + value.detach()
        if self.normalize_advantage:
            advantage = (advantage - advantage.mean()) / advantage.std().clamp(min=1e-6)

        action, behaviour = (entry.flatten(0, 1) for entry in time_major(tensordict, "action", "action_log_prob"))
        log_prob = distribution.log_prob(action).float()
        log_ratio = log_prob.detach() - behaviour
        over = log_ratio.expm1()
        entropy = entropy_of(distribution).mean()
        return TensorDict(
            {
                "loss_actor": -(advantage.flatten() * log_prob).mean(),
                "loss_critic": self.critic_coeff * 0.5 * (value - target).square().mean(),
                "loss_entropy": -self.entropy_coeff * entropy,
                "entropy": entropy.detach(),
                "advantage": (target - value.detach()).abs().mean(),
                "rollout_kl": (over - log_ratio).mean(),
                "rollout_ratio_error": over.abs().max(),
            },
            batch_size=[],
        )
