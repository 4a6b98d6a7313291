"""What a command line says before it can be parsed: which recipe's options it has, and where they start."""

from __future__ import annotations

from collections.abc import Sequence

from fp8rl_torchrl.recipes import config_class
from fp8rl_torchrl.recipes.config import RecipeConfig


def peek(argv: Sequence[str], option: str) -> str | None:
    """The value of an option, as ``--option value`` or ``--option=value``; None if it is not given.

    Args:
        argv: The words of the command line.
        option: The option, with its dashes.
    """
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else next(iter(argv[place + 1 :]), None)
    return None


def starting_config(argv: Sequence[str]) -> RecipeConfig:
    """The options that the others are set on top of: ``--variant``, or the recipe's preset for the task.

    Args:
        argv: The words of the command line, of which ``--algo``, ``--env`` and ``--variant`` are read.

    Raises:
        ValueError: If there is no such recipe or variant.
    """
    recipe = config_class(peek(argv, "--algo") or "actor-critic")
    env, variant = peek(argv, "--env") or "CustomEnv", peek(argv, "--variant")
    return recipe.for_task(env) if variant is None else recipe.variant(variant, env)
