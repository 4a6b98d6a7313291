"""Losses: TorchRL's where they exist, ours only where one is missing."""

from fp8rl_torchrl.objectives.replayed_actor_critic import ReplayedActorCriticLoss

__all__ = ["ReplayedActorCriticLoss"]
