"""Advantage actor-critic: one update on each collection, as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from fp8rl_torchrl.objectives.a2c import RolloutA2CLoss
from fp8rl_torchrl.recipes.wiring import RecipeConfig, linear_decay, seed_everything, truncations_within
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class A2CConfig(RecipeConfig):
    """Options of advantage actor-critic.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"CustomEnv": {"gamma": 0.9, "lr": 1e-2}}
    """Tuned options by task."""

    algo: Literal["a2c"] = "a2c"
    """The recipe."""
    total_frames: int | None = 3_000_000
    """Train for this many environment steps; None counts episodes instead."""
    num_envs: int = 1024
    """Environments stepped side by side."""
    frames_per_collection: int = 8192
    """Environment steps between two updates, over all environments."""
    updates_per_collection: int = 1
    """Always 1: the policy that an update learns from is the one that it changes."""
    min_replay: int = 1
    """Not used: nothing is replayed."""
    eval_every: int = 500_000
    """Evaluate after this many environment steps; 0 evaluates at the end only."""
    activation: Literal["tanh", "relu"] = "relu"
    """The nonlinearity after each layer; relu is several times cheaper on a CPU."""
    lmbda: float = 0.95
    """Trace parameter of the advantages; 1 gives n-step returns."""
    critic_coeff: float = 0.5
    """Weight of the critic's loss."""
    entropy_coeff: float = 0.01
    """Weight of the entropy bonus."""
    normalize_advantage: bool = True
    """Whether a collection's advantages are shifted and scaled to mean 0 and standard deviation 1."""
    lr_decay_updates: int | None = None
    """The learning rate falls linearly over this many updates, by default the whole run's, ..."""
    lr_final: float = 0.05
    """... to this fraction of lr, and stays there."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if self.updates_per_collection != 1 or self.min_replay != 1:
            raise ValueError("a2c learns from each collection once: leave out updates_per_collection and min_replay")
        for name in ("lmbda", "lr_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if min(self.critic_coeff, self.entropy_coeff) < 0:
            raise ValueError("critic_coeff and entropy_coeff must be >= 0")
        if self.lr_decay_updates is not None and self.lr_decay_updates < 1:
            raise ValueError(f"lr_decay_updates must be >= 1; got {self.lr_decay_updates}")

    def resolved(self) -> A2CConfig:
        """See `RecipeConfig.resolved`; the length of the decay is that of the run as it was started."""
        return replace(super().resolved(), lr_decay_updates=self.lr_decay_updates or self._collections())


def build_a2c(config: A2CConfig) -> Pipeline:
    """Compose the pipeline: environment, agent, collector, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    decay: Any = config.lr_decay_updates
    seed_everything(config.seed)
    env = config.make_env()
    agent = config.make_agent(env)
    conversion = config.convert_agent(agent)
    collector = config.make_collector(env, agent.policy)
    loss = RolloutA2CLoss(
        agent,
        gamma=config.gamma,
        lmbda=config.lmbda,
        critic_coeff=config.critic_coeff,
        entropy_coeff=config.entropy_coeff,
        normalize_advantage=config.normalize_advantage,
        episode_ends=truncations_within(env, config.frames_per_collection // config.num_envs),
    )
    step = config.make_step(loss, linear_decay(decay, config.lr_final))
    return Pipeline(env, agent, collector, None, loss, step, config, conversion)
