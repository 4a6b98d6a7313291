"""Proximal policy optimisation: several epochs of minibatches on each collection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tensordict import TensorDictBase

from fp8rl_torchrl.data.replay import rollout_buffer
from fp8rl_torchrl.objectives.advantages import RolloutAdvantage
from fp8rl_torchrl.objectives.ppo import JointClipPPOLoss
from fp8rl_torchrl.recipes.on_policy import OnPolicyConfig
from fp8rl_torchrl.recipes.wiring import make_actor_critic, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline, Report


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnPolicyConfig):
    """Options of proximal policy optimisation.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "CartPole-v1": {
            "total_frames": 60_000,
            "num_envs": 16,
            "frames_per_collection": 512,
            "epochs": 8,
            "batch_size": 256,
            "activation": "relu",
            "lr": 3e-3,
            "lmbda": 0.98,
            "entropy_coeff": 0.0,
            "max_grad_norm": 1.0,
            "reward_scale": 0.02,
            "normalize_observation": True,
            "precision": "fp32",
            "collector": "fused",
            "eval_every": 2048,
            "target_return": 500.0,
        },
        "Acrobot-v1": {
            "total_frames": 200_000,
            "lr": 1e-3,
            "reward_scale": 0.05,
            "normalize_observation": True,
            "precision": "fp32",
            "collector": "fused",
            "eval_every": 20_000,
        },
        "Pendulum-v1": {
            # Observations as they are: running statistics follow the policy from hanging to balancing, and what it
            # has learned about swinging up moves away under it.
            "total_frames": 102_400,
            "num_envs": 16,
            "frames_per_collection": 1024,
            "epochs": 10,
            "batch_size": 128,
            "shared": False,
            "activation": "relu",
            "lr": 1e-3,
            "lr_final": 0.1,
            "gamma": 0.9,
            "entropy_coeff": 0.0,
            "reward_scale": 0.1,
            "precision": "fp32",
            "collector": "fused",
            "eval_every": 20_480,
        },
        "MountainCarContinuous-v0": {
            "total_frames": 15_360,
            "num_envs": 6,
            "frames_per_collection": 768,
            "epochs": 10,
            "batch_size": 256,
            "shared": False,
            "state_dependent_noise": True,
            "lr": 1e-3,
            "gamma": 0.999,
            "lmbda": 0.97,
            # Until the goal is found, all there is to learn is that acting costs.
            "entropy_coeff": 0.03,
            "reward_scale": 0.1,
            "normalize_observation": True,
            "precision": "fp32",
            "collector": "fused",
            "eval_every": 1536,
        },
        "LunarLander-v3": {
            "total_frames": 600_000,
            "num_envs": 32,
            "epochs": 6,
            "hidden": (128, 128),
            "activation": "relu",
            "lr": 1e-3,
            "gamma": 0.995,
            "lmbda": 0.98,
            "reward_scale": 0.02,
            "normalize_observation": True,
            "precision": "fp32",
            "eval_every": 50_000,
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
    clip_epsilon: float = 0.2
    """The ratio of new to old policy gains nothing beyond 1 plus or minus this."""
    clip_final: float | None = None
    """clip_epsilon falls linearly to this, over as many updates as the learning rate; None keeps it."""
    max_kl: float | None = None
    """A collection's updates end early once the new policy is farther than this from the old one, in nats; looking
    waits for the device after every update. None does not look."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        self._check_types()
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.frames_per_collection % self.batch_size:
            raise ValueError(
                f"batch_size must divide frames_per_collection; got {self.batch_size} and {self.frames_per_collection}"
            )
        for name in ("clip_epsilon", "clip_final", "max_kl"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0; got {value}")
        super().__post_init__()

    def _updates(self) -> int:
        return self.epochs * self._updates_an_epoch()

    def _updates_an_epoch(self) -> int:
        return self.frames_per_collection // self.batch_size


def build_ppo(config: PPOConfig) -> Pipeline:
    """Compose the pipeline: environment, agent, collector, advantages, rollout buffer, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    noise = config.state_dependent_noise
    parts = make_parts(config, lambda env: make_actor_critic(config, env, config.shared, state_dependent_noise=noise))
    advantage = RolloutAdvantage(
        parts.agent, gamma=config.gamma, lmbda=config.lmbda, episode_ends=config.episode_ends(parts.env)
    )
    buffer = rollout_buffer(config.frames_per_collection, config.batch_size, config.device)
    loss = JointClipPPOLoss(
        parts.agent,
        clip_epsilon=config.clip_epsilon,
        critic_coeff=config.critic_coeff,
        entropy_coeff=config.entropy_coeff,
        normalize_advantage=config.normalize_advantage,
    )

    def anneal(rollout: TensorDictBase, report: Report) -> None:
        if config.clip_final is not None:
            done = min(1.0, report.updates / (config.lr_decay_updates or 1))
            loss.clip_epsilon.fill_(config.clip_epsilon + (config.clip_final - config.clip_epsilon) * done)

    def far_enough(losses: TensorDictBase) -> bool:
        return config.max_kl is not None and losses["kl"].item() > config.max_kl

    return make_pipeline(
        config,
        parts,
        loss,
        make_step(config, loss),
        buffer,
        prepare=advantage,
        after_collection=anneal,
        enough=far_enough,
    )
