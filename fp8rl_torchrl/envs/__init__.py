"""Environments: native ``EnvBase`` ones, any Gymnasium id through `make`, and the conformance checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8rl_torchrl._lazy import lazy_names
from fp8rl_torchrl.envs.gymnasium_env import register

if TYPE_CHECKING:
    from fp8rl_torchrl.envs.classic_control import (
        AcrobotEnv,
        CartPoleEnv,
        MountainCarContinuousEnv,
        MountainCarEnv,
        PendulumEnv,
    )
    from fp8rl_torchrl.envs.conformance import (
        ConformanceReport,
        EnvConformanceError,
        EnvConformanceSuite,
        check_env,
    )
    from fp8rl_torchrl.envs.custom import CustomEnv
    from fp8rl_torchrl.envs.gym import make
    from fp8rl_torchrl.envs.native import NativeEnv

__all__ = [
    "AcrobotEnv",
    "CartPoleEnv",
    "ConformanceReport",
    "CustomEnv",
    "EnvConformanceError",
    "EnvConformanceSuite",
    "MountainCarContinuousEnv",
    "MountainCarEnv",
    "NativeEnv",
    "PendulumEnv",
    "check_env",
    "make",
]

# `gymnasium.make("fp8rl_torchrl:fp8rl/CustomEnv-v0")` imports this package, which therefore registers the
# environment, and loads all that needs torch only when it is asked for.
register()
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AcrobotEnv": "classic_control",
        "CartPoleEnv": "classic_control",
        "ConformanceReport": "conformance",
        "CustomEnv": "custom",
        "EnvConformanceError": "conformance",
        "EnvConformanceSuite": "conformance",
        "MountainCarContinuousEnv": "classic_control",
        "MountainCarEnv": "classic_control",
        "NativeEnv": "native",
        "PendulumEnv": "classic_control",
        "check_env": "conformance",
        "make": "gym",
    },
)
