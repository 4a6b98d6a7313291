"""Reinforcement learning in low precision, end to end on TorchRL.

The public names are loaded on first use: importing the package starts no CUDA, logs nothing and warns nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8rl_torchrl import data, envs, models, objectives, precision, recipes, training
    from fp8rl_torchrl.models import ActorCritic
    from fp8rl_torchrl.precision import Precision
    from fp8rl_torchrl.training import OptimStep, Pipeline, evaluate

__version__ = "0.1.0"

_PACKAGES = ("data", "envs", "models", "objectives", "precision", "recipes", "training")
_HOME = {
    "ActorCritic": "models",
    "OptimStep": "training",
    "Pipeline": "training",
    "Precision": "precision",
    "evaluate": "training",
}

__all__ = [
    "ActorCritic",
    "OptimStep",
    "Pipeline",
    "Precision",
    "__version__",
    "data",
    "envs",
    "evaluate",
    "models",
    "objectives",
    "precision",
    "recipes",
    "training",
]


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
