"""Recipes: each algorithm as a configuration and a page of wiring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fp8rl_torchrl.recipes.a2c import A2CConfig, build_a2c
from fp8rl_torchrl.recipes.actor_critic import ActorCriticConfig, build_actor_critic
from fp8rl_torchrl.recipes.ppo import PPOConfig, build_ppo
from fp8rl_torchrl.recipes.wiring import RecipeConfig
from fp8rl_torchrl.training.loop import Pipeline

__all__ = ["RECIPES", "A2CConfig", "ActorCriticConfig", "PPOConfig", "RecipeConfig", "build", "config_class"]

RECIPES: dict[str, tuple[type[RecipeConfig], Callable[[Any], Pipeline]]] = {
    "actor-critic": (ActorCriticConfig, build_actor_critic),
    "a2c": (A2CConfig, build_a2c),
    "ppo": (PPOConfig, build_ppo),
}
"""Each recipe's configuration and builder, by the name that command lines use."""


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
    for known, builder in RECIPES.values():
        if type(config) is known:
            return builder(config)
    names = ", ".join(each.__name__ for each, _ in RECIPES.values())
    raise TypeError(f"build takes one of {names}; got {type(config).__name__}")
