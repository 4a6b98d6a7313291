"""Checkpoints of a pipeline, and of its best policy, through TorchRL's `Checkpoint`.

They are written aside and published at once, and then the oldest is removed.
"""

from __future__ import annotations

import math
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

    Parameters, target networks, optimizer moments, loss scalers, replay buffer, random streams, the collector with its
    live step, and the loop's counters: for an environment that declares ``stateless = True``, on CPU, a run that was
    stopped and resumed ends bit-identical to one that was not.

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
            loss=pipeline.loss,  # its critics and target networks
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
        _remove_leftovers(self.directory)
        _load(self.checkpoint, latest_checkpoint(self.directory))


class BestPolicy:
    """Keeps the networks as they were at the best evaluation so far.

    The one that it replaced stays beside it, for a run that is killed before its next checkpoint, and resumes where
    the newer one had not been found.

    Args:
        agent: The networks.
        directory: Where they are kept, as checkpoints named by the number of frames; an existing one is continued.

    Attributes:
        eval_return: The mean return of the best evaluation so far; None before the first.
        frames: The environment steps at which it took place; None before the first.

    Raises:
        CheckpointError: If what is in the directory was not kept by this class.
    """

    def __init__(self, agent: Agent, directory: str | Path) -> None:
        self.checkpoint = Checkpoint(agent=agent)
        self.rotation = CheckpointRotation(directory, keep_last=KEEP)
        self._read()

    def offer(self, eval_return: float, frames: int) -> bool:
        """Keep the networks as they are now, if their evaluation beats all before.

        A tie does not: the policy that was there first stays. A return that is not finite beats nothing.

        Args:
            eval_return: The mean return of their evaluation.
            frames: The environment steps so far.

        Returns:
            Whether they are kept.
        """
        if not math.isfinite(eval_return) or (self.eval_return is not None and eval_return <= self.eval_return):
            return False
        notes = {"eval_return": eval_return, "frames": frames}
        self.rotation.save(self.checkpoint, step=frames, metadata=notes)
        self.eval_return, self.frames = eval_return, frames
        return True

    def cut_back(self, frames: int) -> None:
        """Forget what was found after ``frames`` environment steps: the run goes on from there, perhaps elsewhere."""
        _remove_leftovers(self.rotation.directory)
        for path in self.rotation.checkpoints():
            if _notes(path)["frames"] > frames:
                shutil.rmtree(path)
        self._read()

    def _read(self) -> None:
        latest = self.rotation.latest()
        notes = {"eval_return": None, "frames": None} if latest is None else _notes(latest)
        self.eval_return: float | None = notes["eval_return"]
        self.frames: int | None = notes["frames"]


def _notes(path: Path) -> dict[str, Any]:
    notes = Checkpoint.manifest(path)["metadata"]
    if not {"eval_return", "frames"} <= set(notes):
        raise CheckpointError(f"{path} says nothing of its evaluation, so it cannot be compared with another")
    return notes


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # a save that was killed half-way


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
    """The newest checkpoint in a directory.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    rotation = CheckpointRotation(directory, keep_last=KEEP)
    # The rotation passes over what is damaged; names are padded, so the newest comes last.
    latest, newest = rotation.latest(), max(rotation.directory.glob("checkpoint-*"), default=None)
    if newest is None:
        raise CheckpointError(f"there is no checkpoint in {directory}")
    if latest is None or latest != newest:
        older = "there is no older one" if latest is None else f"remove it to go on from {latest.name}"
        raise CheckpointError(f"{newest}, the newest checkpoint, is damaged: its manifest cannot be read; {older}")
    return latest


def best_checkpoint(directory: str | Path) -> Path:
    """The best policy that `BestPolicy` has kept in a directory.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    if not any(Path(directory).glob("checkpoint-*")):
        raise CheckpointError(
            f"there is no best policy in {directory}: one is kept at the first periodic evaluation (eval_every)"
        )
    return latest_checkpoint(directory)
