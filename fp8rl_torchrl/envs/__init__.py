"""Environments: native ``EnvBase`` ones, any Gymnasium id through `make`, and the conformance checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8rl_torchrl._lazy import lazy_names

if TYPE_CHECKING:
    from fp8rl_torchrl.envs.conformance import (
        ConformanceReport,
        EnvConformanceError,
        EnvConformanceSuite,
        check_env,
    )
    from fp8rl_torchrl.envs.custom import CustomEnv
    from fp8rl_torchrl.envs.gym import make

__all__ = ["ConformanceReport", "CustomEnv", "EnvConformanceError", "EnvConformanceSuite", "check_env", "make"]

# Lazy, because Gymnasium imports this package to register our environment for everyone who imports Gymnasium.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConformanceReport": "conformance",
        "CustomEnv": "custom",
        "EnvConformanceError": "conformance",
        "EnvConformanceSuite": "conformance",
        "check_env": "conformance",
        "make": "gym",
    },
)
