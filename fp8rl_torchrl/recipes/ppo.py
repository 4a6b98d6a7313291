"""Proximal policy optimisation: several epochs of minibatches on each collection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from fp8rl_torchrl.data.replay import rollout_buffer
from fp8rl_torchrl.objectives.advantages import RolloutAdvantage
from fp8rl_torchrl.objectives.ppo import JointClipPPOLoss
from fp8rl_torchrl.recipes.wiring import RecipeConfig, linear_decay, seed_everything, truncations_within
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RecipeConfig):
    """Options of proximal policy optimisation.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "CartPole-v1": {
            "total_frames": 100_000,
            "num_envs": 32,
            "frames_per_collection": 1024,
            "epochs": 8,
            "batch_size": 256,
            "lr": 5e-3,
            "clip_epsilon": 0.25,
            "precision": "fp32",
            "collector": "fused",
            "eval_every": 8192,
        },
    }
    """Tuned options by task."""

    algo: Literal["ppo"] = "ppo"
    """The recipe."""
    total_frames: int | None = 500_000
    """Train for this many environment steps; None counts episodes instead."""
    num_envs: int = 64
    """Environments stepped side by side."""
    frames_per_collection: int = 4096
    """Environment steps between two phases of updates, over all environments."""
    epochs: int = 4
    """Passes over each collection."""
    batch_size: int = 512
    """Transitions in a minibatch; divides frames_per_collection."""
    updates_per_collection: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Follows from epochs and batch_size; not to be set."""
    min_replay: int = 1
    """Not used: every collection is learned from."""
    clip_epsilon: float = 0.2
    """The ratio of new to old policy gains nothing beyond 1 plus or minus this."""
    lmbda: float = 0.95
    """Trace parameter of the advantages; 1 gives n-step returns."""
    critic_coeff: float = 0.5
    """Weight of the critic's loss."""
    entropy_coeff: float = 0.01
    """Weight of the entropy bonus."""
    normalize_advantage: bool = True
    """Whether a minibatch's advantages are shifted and scaled to mean 0 and standard deviation 1."""
    lr_decay_updates: int | None = None
    """The learning rate falls linearly over this many updates, by default the whole run's, ..."""
    lr_final: float = 0.05
    """... to this fraction of lr, and stays there."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        for name in ("epochs", "batch_size", "lr_decay_updates"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.frames_per_collection % self.batch_size:
            raise ValueError(
                f"batch_size must divide frames_per_collection; got {self.batch_size} and {self.frames_per_collection}"
            )
        if self.updates_per_collection not in (None, self._updates()):
            raise ValueError("updates_per_collection follows from epochs and batch_size: set those")
        for name in ("lmbda", "lr_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if not self.clip_epsilon > 0:
            raise ValueError(f"clip_epsilon must be > 0; got {self.clip_epsilon}")
        for name in ("critic_coeff", "entropy_coeff"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}")

    def _updates(self) -> int:
        return self.epochs * (self.frames_per_collection // self.batch_size)

    def resolved(self) -> PPOConfig:
        """See `RecipeConfig.resolved`; the length of the decay is that of the run as it was started."""
        decay = self.lr_decay_updates or self._updates() * self._collections()
        return replace(super().resolved(), updates_per_collection=self._updates(), lr_decay_updates=decay)

    def chosen(self, device: str) -> tuple[dict[str, str], list[str]]:
        """See `RecipeConfig.chosen`."""
        return super(PPOConfig, replace(self, updates_per_collection=self._updates())).chosen(device)


def build_ppo(config: PPOConfig) -> Pipeline:
    """Compose the pipeline: environment, agent, collector, advantages, rollout buffer, loss, step.

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
    advantage = RolloutAdvantage(
        agent,
        gamma=config.gamma,
        lmbda=config.lmbda,
        episode_ends=truncations_within(env, config.frames_per_collection // config.num_envs),
    )
    buffer = rollout_buffer(config.frames_per_collection, config.batch_size, config.device)
    loss = JointClipPPOLoss(
        agent,
        clip_epsilon=config.clip_epsilon,
        critic_coeff=config.critic_coeff,
        entropy_coeff=config.entropy_coeff,
        normalize_advantage=config.normalize_advantage,
    )
    step = config.make_step(loss, linear_decay(decay, config.lr_final))
    return Pipeline(env, agent, collector, buffer, loss, step, config, conversion, prepare=advantage)
