"""Collecting and storing experience."""

from fp8rl_torchrl.data.collect import CollectorState, restores_exactly
from fp8rl_torchrl.data.replay import replay_buffer, rollout_buffer

__all__ = ["CollectorState", "replay_buffer", "restores_exactly", "rollout_buffer"]
