"""Native forms of Gymnasium's classic control tasks."""

from fp8rl_torchrl.envs.classic_control.acrobot import AcrobotDynamics, AcrobotEnv, AcrobotState
from fp8rl_torchrl.envs.classic_control.cart_pole import CartPoleDynamics, CartPoleEnv, CartPoleState
from fp8rl_torchrl.envs.classic_control.mountain_car import (
    MountainCarContinuousDynamics,
    MountainCarContinuousEnv,
    MountainCarDynamics,
    MountainCarEnv,
    MountainCarState,
)
from fp8rl_torchrl.envs.classic_control.pendulum import PendulumDynamics, PendulumEnv, PendulumState

__all__ = [
    "AcrobotDynamics",
    "AcrobotEnv",
    "AcrobotState",
    "CartPoleDynamics",
    "CartPoleEnv",
    "CartPoleState",
    "MountainCarContinuousDynamics",
    "MountainCarContinuousEnv",
    "MountainCarDynamics",
    "MountainCarEnv",
    "MountainCarState",
    "PendulumDynamics",
    "PendulumEnv",
    "PendulumState",
]
