"""Collecting and storing experience."""

from fp8rl_torchrl.data.collect import CollectorState, make_collector, restores_exactly
from fp8rl_torchrl.data.fused import FusedCollector
from fp8rl_torchrl.data.multi_step import n_step
from fp8rl_torchrl.data.packed import PackedReplayBuffer, PackedStorage
from fp8rl_torchrl.data.replay import prioritized_replay_buffer, replay_buffer, rollout_buffer

__all__ = [
    "CollectorState",
    "FusedCollector",
    "PackedReplayBuffer",
    "PackedStorage",
    "make_collector",
    "n_step",
    "prioritized_replay_buffer",
    "replay_buffer",
    "restores_exactly",
    "rollout_buffer",
]
