"""Storing experience: a replay buffer for off-policy and a rollout buffer for on-policy learning.

Both are `PackedReplayBuffer`, a faster `TensorDictReplayBuffer`; what it cannot pack, images for instance, it keeps and
samples as that class does. A buffer with priorities is TorchRL's own.
"""

from __future__ import annotations

import torch
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer
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


def prioritized_replay_buffer(
    capacity: int, batch_size: int, alpha: float = 0.6, beta: float = 0.4, device: torch.device | str = "cpu"
) -> TensorDictPrioritizedReplayBuffer:
    """A buffer of the newest transitions that draws those with a large error more often (Schaul et al., 2016).

    After each update, hand it the batch, ``buffer.update_tensordict_priority(batch)``, in which the loss has written
    ``td_error``; ``priority_weight`` of a batch weighs its losses.

    Args:
        capacity: The number of transitions kept.
        batch_size: The number of transitions in a batch.
        alpha: How much more often; 0 is uniform.
        beta: How far the weights correct for that; 1 does fully.
        device: Where transitions are stored.

    Raises:
        ValueError: If TorchRL's compiled extension, which keeps the priorities, does not load here.
    """
    try:
        return TensorDictPrioritizedReplayBuffer(
            alpha=alpha, beta=beta, storage=LazyTensorStorage(capacity, device=device), batch_size=batch_size
        )
    except (ImportError, NameError, RuntimeError) as error:
        raise ValueError(
            "prioritized replay needs TorchRL's compiled extension, which does not load with this PyTorch "
            f"({torch.__version__}): install the PyTorch that your TorchRL was built for (a plain `pip install torch "
            f"torchrl` does), or replay uniformly. The cause: {error}"
        ) from error


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
