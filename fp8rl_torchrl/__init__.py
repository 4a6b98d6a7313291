"""Reinforcement learning in low precision, end to end on TorchRL.

The public names are loaded on first use: importing the package starts no CUDA, logs nothing and warns nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8rl_torchrl import envs as envs  # registers the environment with Gymnasium
from fp8rl_torchrl._lazy import lazy_names

if TYPE_CHECKING:
    from fp8rl_torchrl import data, models, numerics, objectives, precision, recipes, training
    from fp8rl_torchrl.models.actor_critic import ActorCritic
    from fp8rl_torchrl.precision.convert import convert
    from fp8rl_torchrl.precision.linear import Float8Linear
    from fp8rl_torchrl.precision.mode import Precision
    from fp8rl_torchrl.precision.twin import twin
    from fp8rl_torchrl.training.evaluate import EvalResult, evaluate
    from fp8rl_torchrl.training.loop import Pipeline
    from fp8rl_torchrl.training.step import OptimStep

__version__ = "0.1.0"

__all__ = [
    "ActorCritic",
    "EvalResult",
    "Float8Linear",
    "OptimStep",
    "Pipeline",
    "Precision",
    "convert",
    "data",
    "envs",
    "evaluate",
    "models",
    "numerics",
    "objectives",
    "precision",
    "recipes",
    "training",
    "twin",
]

__getattr__, _ = lazy_names(
    __name__,
    {
        "ActorCritic": "models.actor_critic",
        "EvalResult": "training.evaluate",
        "Float8Linear": "precision.linear",
        "OptimStep": "training.step",
        "Pipeline": "training.loop",
        "Precision": "precision.mode",
        "convert": "precision.convert",
        "data": "data",
        "envs": "envs",
        "evaluate": "training.evaluate",
        "models": "models",
        "numerics": "numerics",
        "objectives": "objectives",
        "precision": "precision",
        "recipes": "recipes",
        "training": "training",
        "twin": "precision.twin",
    },
)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
