"""Environments: native ``EnvBase`` ones, any Gymnasium id through `make`, and the conformance checks."""

from fp8rl_torchrl.envs.conformance import ConformanceReport, EnvConformanceError, EnvConformanceSuite, check_env
from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gym import make

__all__ = ["ConformanceReport", "CustomEnv", "EnvConformanceError", "EnvConformanceSuite", "check_env", "make"]
