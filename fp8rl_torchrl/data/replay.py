"""Storing experience: a replay buffer for off-policy and a rollout buffer for on-policy learning.

Both are `PackedReplayBuffer`, a faster `TensorDictReplayBuffer`; what it cannot pack, images for instance, it keeps and
samples as that class does.
"""

from __future__ import annotations

import torch
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from fp8rl_torchrl.data.packed import PackedReplayBuffer, PackedStorage


def replay_buffer(
    capacity: int = 10_000, batch_size: int = 64, device: torch.device | str = "cpu"
) -> PackedReplayBuffer:
    """A buffer of the newest transitions; every batch is a uniform sample with replacement.

    Args:
        capacity: The number of transitions kept.
        batch_size: The number of transitions in a batch.
        device: Where transitions are stored and batches are drawn.
    """
    return PackedReplayBuffer(storage=PackedStorage(capacity, device=device), batch_size=batch_size)


def rollout_buffer(frames: int, batch_size: int, device: torch.device | str = "cpu") -> PackedReplayBuffer:
    """A buffer of one collection; a pass over it draws every transition once, in random minibatches.

    Args:
        frames: The number of transitions in a collection.
        batch_size: The size of a minibatch; must divide ``frames``, so that no minibatch is smaller than the others.
        device: Where transitions are stored and minibatches are drawn.

    Raises:
        ValueError: If ``batch_size`` does not divide ``frames``.
    """
    if frames % batch_size:
        raise ValueError(f"batch_size must divide the {frames} frames of a collection; got {batch_size}")
    return PackedReplayBuffer(
        storage=PackedStorage(frames, device=device), sampler=SamplerWithoutReplacement(), batch_size=batch_size
    )
