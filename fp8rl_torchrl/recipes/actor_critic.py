"""The default recipe: an actor-critic that learns from replayed transitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8rl_torchrl.data.replay import replay_buffer
from fp8rl_torchrl.objectives.replayed_actor_critic import ReplayedActorCriticLoss
from fp8rl_torchrl.recipes.wiring import RecipeConfig, linear_decay, seed_everything
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(RecipeConfig):
    """Options of the replayed actor-critic.

    Raises:
        ValueError: If an option is out of range.
    """

    algo: Literal["actor-critic"] = "actor-critic"
    """The recipe."""
    replay_size: int = 10_000
    """Transitions kept for replay."""
    batch_size: int = 64
    """Transitions in the batch of one update."""
    shared: bool = True
    """Whether actor and critic share the encoder."""
    max_weight: float = 1.0
    """Importance weights are truncated to this."""
    critic_coeff: float = 0.5
    """Weight of the critic's loss."""
    entropy_coeff: float = 0.05
    """Weight of the entropy bonus."""
    lr_decay_updates: int = 8500
    """The learning rate falls linearly over this many updates ..."""
    lr_final: float = 0.05
    """... to this fraction of lr, and stays there."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        for name in ("replay_size", "batch_size", "lr_decay_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if not self.min_replay <= self.replay_size:
            raise ValueError(f"min_replay {self.min_replay} would never be stored in replay_size {self.replay_size}")
        if self.batch_size > self.replay_size:
            raise ValueError(f"batch_size {self.batch_size} is more than replay_size {self.replay_size} holds")
        if self.replay_size < self.frames_per_collection:
            raise ValueError(f"replay_size must hold a collection, {self.frames_per_collection} transitions")
        if not 0 <= self.lr_final <= 1:
            raise ValueError(f"lr_final must lie in [0, 1]; got {self.lr_final}")
        if not self.max_weight > 0:
            raise ValueError(f"max_weight must be > 0; got {self.max_weight}")
        if min(self.critic_coeff, self.entropy_coeff) < 0:
            raise ValueError("critic_coeff and entropy_coeff must be >= 0")


def build_actor_critic(config: ActorCriticConfig) -> Pipeline:
    """Compose the pipeline: environment, agent, collector, replay buffer, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    seed_everything(config.seed)
    env = config.make_env()
    agent = config.make_agent(env, config.shared)
    conversion = config.convert_agent(agent)
    collector = config.make_collector(env, agent.policy)
    replay = replay_buffer(config.replay_size, config.batch_size, config.device)
    loss = ReplayedActorCriticLoss(
        agent,
        gamma=config.gamma,
        max_weight=config.max_weight,
        critic_coeff=config.critic_coeff,
        entropy_coeff=config.entropy_coeff,
    )
    step = config.make_step(loss, linear_decay(config.lr_decay_updates, config.lr_final))
    return Pipeline(env, agent, collector, replay, loss, step, config, conversion)
