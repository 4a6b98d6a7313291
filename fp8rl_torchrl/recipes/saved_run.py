"""`open_run`: the networks of a run folder, as one of its checkpoints has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fp8rl_torchrl.recipes import build, config_class
from fp8rl_torchrl.recipes.config import RecipeConfig
from fp8rl_torchrl.training.checkpoint import best_checkpoint, latest_checkpoint, load_agent
from fp8rl_torchrl.training.loop import Pipeline
from fp8rl_torchrl.training.run_folder import RunFolder


class SavedRun(NamedTuple):
    """A run whose networks are restored; its pipeline has not trained."""

    config: RecipeConfig
    pipeline: Pipeline
    checkpoint: Path


def open_run(folder: str | Path, checkpoint: str | Path | None = None, best: bool = False, **options: Any) -> SavedRun:
    """Build a run's pipeline again and restore its networks.

    Args:
        folder: The run folder.
        checkpoint: The folder of a checkpoint; by default the newest of the run.
        best: Take the policy of the run's best periodic evaluation instead.
        **options: Options of the run to set otherwise, such as ``device``.

    Raises:
        ValueError: If the folder is no run's, there is no such checkpoint, or it does not fit.
    """
    if best and checkpoint:
        raise ValueError("--best and --checkpoint name two policies; leave one out")
    run = RunFolder(folder)
    saved = run.read_config()
    config = config_class(saved.get("algo", "actor-critic")).from_dict(saved)
    config = dataclasses.replace(config, **options)
    if checkpoint:
        found = Path(checkpoint)
    else:
        found = best_checkpoint(run.best) if best else latest_checkpoint(run.checkpoints)
    torch.set_num_threads(config.num_threads)
    pipeline = build(config)
    load_agent(pipeline.agent, found, pipeline.env.device)
    return SavedRun(config, pipeline, found)
