"""Checkpoints of a pipeline through TorchRL's `Checkpoint`: written aside, published at once, the oldest removed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation, GlobalRNGState

from fp8rl_torchrl.training.loop import Agent, Pipeline

KEEP = 2


class CheckpointError(ValueError):
    """A checkpoint is missing or does not fit."""


class PipelineCheckpoints:
    """Saves and restores everything that a pipeline's future depends on.

    Parameters, optimizer moments, loss scalers, replay buffer, random streams, the collector with its live step, and
    the loop's counters: for an environment that declares ``stateless = True``, on CPU, a run that was stopped and
    resumed ends bit-identical to one that was not.

    Args:
        pipeline: The pipeline to save and restore.
        collector_state: An object with ``state_dict`` and ``load_state_dict`` for the collector, such as
            `fp8rl_torchrl.data.CollectorState`.
        directory: Where the checkpoints lie, one folder each, named by the number of frames.
    """

    def __init__(self, pipeline: Pipeline, collector_state: Any, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.checkpoint = Checkpoint(
            agent=pipeline.agent,
            step=pipeline.step,
            replay=pipeline.replay,
            collector=collector_state,
            progress=pipeline,
            random_streams=GlobalRNGState(),
        )
        self.rotation = CheckpointRotation(self.directory, keep_last=KEEP)

    def save(self, frames: int, metadata: Mapping[str, Any] | None = None) -> Path:
        """Save the pipeline as it stands between two collections.

        Args:
            frames: The environment steps so far; names the checkpoint.
            metadata: JSON-compatible notes for the manifest.

        Returns:
            The checkpoint's folder.
        """
        return self.rotation.save(self.checkpoint, step=frames, metadata=metadata)

    def load_latest(self) -> None:
        """Restore the newest checkpoint.

        Raises:
            CheckpointError: If there is none, or it does not fit the pipeline.
        """
        for leftover in self.directory.glob(".checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # a save that was killed half-way
        _load(self.checkpoint, latest_checkpoint(self.directory))


def load_agent(agent: Agent, checkpoint: str | Path, device: torch.device | str) -> None:
    """Restore the networks alone from one checkpoint.

    Args:
        agent: The networks, built as they were for the run.
        checkpoint: The checkpoint's folder.
        device: Where the networks are.

    Raises:
        CheckpointError: If this is no checkpoint, or it does not fit the networks.
    """
    if not Checkpoint.is_checkpoint(checkpoint):
        raise CheckpointError(f"{checkpoint} is not a checkpoint")
    _load(Checkpoint(agent=agent), Path(checkpoint), map_location=str(device))


def _load(checkpoint: Checkpoint, path: Path, **options: Any) -> None:
    try:
        checkpoint.load(path, **options)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} does not fit this run: {error}") from error


def latest_checkpoint(directory: str | Path) -> Path:
    """The newest complete checkpoint in a directory.

    Raises:
        CheckpointError: If there is none.
    """
    latest = CheckpointRotation(directory, keep_last=KEEP).latest()
    if latest is None:
        raise CheckpointError(f"there is no checkpoint in {directory}")
    return latest
