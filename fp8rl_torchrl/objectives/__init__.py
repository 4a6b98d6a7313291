"""Losses: TorchRL's where they exist, ours where one is missing or would run a shared encoder more than once."""

from fp8rl_torchrl.objectives.a2c import RolloutA2CLoss
from fp8rl_torchrl.objectives.advantages import RolloutAdvantage
from fp8rl_torchrl.objectives.ppo import JointClipPPOLoss
from fp8rl_torchrl.objectives.replayed_actor_critic import ReplayedActorCriticLoss

__all__ = ["JointClipPPOLoss", "ReplayedActorCriticLoss", "RolloutA2CLoss", "RolloutAdvantage"]
