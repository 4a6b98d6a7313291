"""Losses: TorchRL's where they exist, ours where one is missing or would run a shared encoder more than once."""

from fp8rl_torchrl.objectives.a2c import RolloutA2CLoss
from fp8rl_torchrl.objectives.advantages import RolloutAdvantage
from fp8rl_torchrl.objectives.ppo import JointClipPPOLoss
from fp8rl_torchrl.objectives.replayed_actor_critic import ReplayedActorCriticLoss
from fp8rl_torchrl.objectives.returns_to_go import ReturnsToGo

__all__ = ["JointClipPPOLoss", "ReplayedActorCriticLoss", "ReturnsToGo", "RolloutA2CLoss", "RolloutAdvantage"]
