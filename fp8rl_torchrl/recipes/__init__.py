"""Recipes: each algorithm as a configuration and a page of wiring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fp8rl_torchrl.recipes.a2c import A2CConfig, build_a2c
from fp8rl_torchrl.recipes.actor_critic import ActorCriticConfig, build_actor_critic
from fp8rl_torchrl.recipes.auto_precision import AutoPrecision, choose_precision
from fp8rl_torchrl.recipes.config import Config, RecipeConfig
from fp8rl_torchrl.recipes.dqn import DQNConfig, build_dqn
from fp8rl_torchrl.recipes.ppo import PPOConfig, build_ppo
from fp8rl_torchrl.recipes.reinforce import ReinforceConfig, build_reinforce
from fp8rl_torchrl.recipes.sac import SACConfig, build_sac
from fp8rl_torchrl.recipes.td3 import TD3Config, build_td3
from fp8rl_torchrl.training.loop import Pipeline

__all__ = [
    "RECIPES",
    "A2CConfig",
    "ActorCriticConfig",
    "DQNConfig",
    "PPOConfig",
    "RecipeConfig",
    "ReinforceConfig",
    "SACConfig",
    "TD3Config",
    "build",
    "config_class",
    "resolve_precision",
]

RECIPES: dict[str, tuple[type[RecipeConfig], Callable[[Any], Pipeline]]] = {
    "actor-critic": (ActorCriticConfig, build_actor_critic),
    "reinforce": (ReinforceConfig, build_reinforce),
    "a2c": (A2CConfig, build_a2c),
    "ppo": (PPOConfig, build_ppo),
    "dqn": (DQNConfig, build_dqn),
    "sac": (SACConfig, build_sac),
    "td3": (TD3Config, build_td3),
}
"""Each recipe's configuration and builder, by the name that command lines use."""


_WITHOUT_EFFECT_ON_SPEED = {
    "precision",
    "rollout_precision",
    "collector",
    "seed",
    "episodes",
    "total_frames",
    "eval_every",
    "eval_episodes",
    "final_eval_episodes",
    "checkpoint_every",
    "report_every",
    "lr",
    "lr_decay_updates",
    "lr_final",
    "target_return",
}


def config_class(algo: str) -> type[RecipeConfig]:
    """The configuration class of a recipe, by the name that command lines use.

    Raises:
        ValueError: If there is no such recipe.
    """
    if algo not in RECIPES:
        raise ValueError(f"unknown algo {algo!r}; use one of {', '.join(RECIPES)}")
    return RECIPES[algo][0]


def build(config: RecipeConfig) -> Pipeline:
    """Compose the pipeline that a configuration describes.

    Args:
        config: A recipe's configuration, such as ``ActorCriticConfig(env="CustomEnv", precision="bf16")``.

    Returns:
        The pipeline; iterate it to train.

    Raises:
        TypeError: If the configuration belongs to no recipe.
        ValueError: If it names something that does not exist here.
    """
    return _builder(config)(resolve_precision(config)[0])


def resolve_precision(config: Config) -> tuple[Config, AutoPrecision | None]:
    """Put a precision in the place of ``"auto"``, by measuring updates of this configuration (see `choose_precision`).

    Returns:
        The configuration with a precision's name, and how it was chosen; None where it was given.
    """
    if config.precision != "auto":
        return config, None
    builder = _builder(config)

    def make_update(name: str) -> Callable[[], object]:
        # TorchRL's collector needs no compilation; the update is compiled if the run's is.
        pipeline = builder(dataclasses.replace(settled, precision=name, collector="torchrl"))
        rollout = next(iter(pipeline.collector))
        if pipeline.prepare is not None:
            rollout = pipeline.prepare(rollout)
        batch = rollout.select(*(pipeline.keys or pipeline.loss.in_keys))
        if pipeline.replay is not None:
            pipeline.replay.extend(batch.reshape(-1))
            batch = pipeline.replay.sample()
        return lambda: pipeline.step(batch)

    settled = dataclasses.replace(config, precision="fp32").resolved()
    key = {name: value for name, value in settled.to_dict().items() if name not in _WITHOUT_EFFECT_ON_SPEED}
    auto = choose_precision(key, settled.device, make_update)
    return dataclasses.replace(config, precision=auto.name), auto


def _builder(config: RecipeConfig) -> Callable[[Any], Pipeline]:
    for known, builder in RECIPES.values():
        if type(config) is known:
            return builder
    names = ", ".join(each.__name__ for each, _ in RECIPES.values())
    raise TypeError(f"build takes one of {names}; got {type(config).__name__}")
