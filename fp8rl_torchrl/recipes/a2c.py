"""Advantage actor-critic: one update on each collection, as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fp8rl_torchrl.objectives.a2c import RolloutA2CLoss
from fp8rl_torchrl.recipes.on_policy import OnPolicyConfig
from fp8rl_torchrl.recipes.wiring import make_actor_critic, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class A2CConfig(OnPolicyConfig):
    """Options of advantage actor-critic.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "CustomEnv": {"gamma": 0.9, "lr": 1e-2},
        "CartPole-v1": {
            "total_frames": 100_000,
            "num_envs": 16,
            "frames_per_collection": 64,
            "activation": "tanh",
            "lr": 5e-3,
            "gamma": 0.98,
            "max_grad_norm": 0.5,
            "reward_scale": 0.05,
            "normalize_observation": True,
            "precision": "fp32",
            "collector": "fused",
            "report_every": 100,
            "eval_every": 2048,
            "target_return": 500.0,
        },
    }
    """Tuned options by task."""

    algo: Literal["a2c"] = "a2c"
    """The recipe."""
    total_frames: int | None = 3_000_000
    """Train for this many environment steps; None counts episodes instead."""
    num_envs: int = 1024
    """Environments stepped side by side."""
    frames_per_collection: int = 8192
    """Environment steps between two updates, over all environments."""
    report_every: int = 1000
    """Print the average return of every so many episodes, of which many environments end a lot."""
    eval_every: int = 500_000
    """Evaluate after this many environment steps; 0 evaluates at the end only."""
    activation: Literal["tanh", "relu"] = "relu"
    """The nonlinearity after each layer; relu is several times cheaper on a CPU."""


def build_a2c(config: A2CConfig) -> Pipeline:
    """Compose the pipeline: environment, agent, collector, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    noise = config.state_dependent_noise
    parts = make_parts(config, lambda env: make_actor_critic(config, env, config.shared, state_dependent_noise=noise))
    loss = RolloutA2CLoss(
        parts.agent,
        gamma=config.gamma,
        lmbda=config.lmbda,
        critic_coeff=config.critic_coeff,
        entropy_coeff=config.entropy_coeff,
        normalize_advantage=config.normalize_advantage,
        episode_ends=config.episode_ends(parts.env),
    )
    return make_pipeline(config, parts, loss, make_step(config, loss), None)
