"""The default recipe: an actor-critic that learns from replayed transitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fp8rl_torchrl.objectives.replayed_actor_critic import ReplayedActorCriticLoss
from fp8rl_torchrl.recipes.off_policy import ReplayConfig
from fp8rl_torchrl.recipes.wiring import make_actor_critic, make_optimizer, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(ReplayConfig):
    """Options of the replayed actor-critic.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "CartPole-v1": {
            "total_frames": 60_000,
            "num_envs": 32,
            "frames_per_collection": 256,
            "updates_per_collection": 12,
            "replay_size": 5000,
            "batch_size": 256,
            "lr_decay_updates": None,
            "entropy_coeff": 0.01,
            "reward_scale": 0.02,
            "normalize_observation": True,
            "precision": "fp32",
            "collector": "fused",
            "eval_every": 2048,
            "target_return": 500.0,
        },
    }
    """Tuned options by task."""
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "online": {
            "shared": False,
            "hidden": (128,),
            "two_optimizers": True,
            "lr": 1e-3,
            "lr_schedule": "constant",
            "num_envs": 1,
            "frames_per_collection": 1,
            "replay_size": 0,
            "entropy_coeff": 0.0,
            "max_grad_norm": None,
        },
    }
    """Named sets of options for any task: ``online`` learns from every step once, as it is taken."""

    algo: Literal["actor-critic"] = "actor-critic"
    """The recipe."""
    shared: bool = True
    """Whether actor and critic share the encoder."""
    max_weight: float = 1.0
    """Importance weights are truncated to this."""
    critic_coeff: float = 0.5
    """Weight of the critic's loss."""
    entropy_coeff: float = 0.05
    """Weight of the entropy bonus."""
    two_optimizers: bool = False
    """Whether actor and critic each have an optimizer, gradient norm and loss scale of their own; for separate
    encoders, and without an entropy bonus."""
    lr_decay_updates: int | None = 7000
    """The updates over which the learning rate falls."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if not self.max_weight > 0:
            raise ValueError(f"max_weight must be > 0; got {self.max_weight}")
        if min(self.critic_coeff, self.entropy_coeff) < 0:
            raise ValueError("critic_coeff and entropy_coeff must be >= 0")
        if self.two_optimizers and (self.shared or self.entropy_coeff):
            raise ValueError("two_optimizers needs shared=False and entropy_coeff=0")


def build_actor_critic(config: ActorCriticConfig) -> Pipeline:
    """Compose the pipeline: environment, agent, collector, replay buffer, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    parts = make_parts(config, lambda env: make_actor_critic(config, env, config.shared))
    loss = ReplayedActorCriticLoss(
        parts.agent,
        gamma=config.gamma,
        max_weight=config.max_weight,
        critic_coeff=config.critic_coeff,
        entropy_coeff=config.entropy_coeff,
    )
    optimizer = None
    if config.two_optimizers:
        optimizer = {
            "loss_actor": make_optimizer(config, parts.agent.policy.parameters()),
            "loss_critic": make_optimizer(config, parts.agent.value.parameters()),
        }
    return make_pipeline(config, parts, loss, make_step(config, loss, optimizer=optimizer), config.make_replay())
