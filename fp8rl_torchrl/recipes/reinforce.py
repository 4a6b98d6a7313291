"""REINFORCE: whole episodes, one update each time, with or without a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torchrl.objectives import ReinforceLoss

from fp8rl_torchrl.objectives.returns_to_go import ReturnsToGo
from fp8rl_torchrl.recipes.on_policy import FreshConfig
from fp8rl_torchrl.recipes.wiring import make_actor_critic, make_optimizer, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(FreshConfig):
    """Options of REINFORCE.

    Every collection begins with new episodes, so it should have room for the longest:
    ``frames_per_collection`` / ``num_envs`` steps.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "CartPole-v1": {
            "total_frames": 400_000,
            "lr": 1e-2,
            "precision": "fp32",
            "collector": "fused",
            "eval_every": 4000,
            "target_return": 500.0,
        },
    }
    """Tuned options by task."""

    algo: Literal["reinforce"] = "reinforce"
    """The recipe."""
    total_frames: int | None = 500_000
    """Train for this many environment steps; None counts episodes instead."""
    num_envs: int = 8
    """Environments stepped side by side."""
    frames_per_collection: int = 4000
    """Environment steps between two updates, over all environments."""
    normalize_advantage: bool = True
    """Whether the returns of a collection are shifted and scaled to mean 0 and standard deviation 1."""
    baseline: bool = False
    """Whether a second network learns the states' values, which are taken off the returns."""


def build_reinforce(config: ReinforceConfig) -> Pipeline:
    """Compose the pipeline: environment, networks, collector, returns, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    parts = make_parts(config, lambda env: make_actor_critic(config, env, shared=False), reset_at_each_iter=True)
    agent = parts.agent
    returns = ReturnsToGo(agent, gamma=config.gamma, baseline=config.baseline, normalize=config.normalize_advantage)
    loss: Any = ReinforceLoss(agent.policy, agent.value, loss_critic_type="l2")
    # Without a baseline the critic is not trained: of the sum of both losses, the actor sees its own.
    optimizer: Any = make_optimizer(config, loss.actor_network_params.parameters())
    if config.baseline:
        critic = make_optimizer(config, loss.critic_network_params.parameters())
        optimizer = {"loss_actor": optimizer, "loss_value": critic}
    step = make_step(config, loss, optimizer=optimizer)
    keys = [*agent.policy.in_keys, "action", "advantage", "value_target"]
    return make_pipeline(config, parts, loss, step, None, prepare=returns, keys=keys)
