"""Evaluate the policy of a finished or running training run, deterministically, on fresh episodes."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fp8rl_torchrl import EvalResult, evaluate
from fp8rl_torchrl.recipes.saved_run import open_run
from fp8rl_torchrl.training.video import record_video


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate."""

    run: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    episodes: int = 100
    """Number of complete episodes."""
    seed: int = 1_000_003
    """Seed of the evaluation episodes."""
    checkpoint: str | None = None
    """The folder of a checkpoint; by default the newest in RUN/checkpoints."""
    best: bool = False
    """Take the policy of the run's best periodic evaluation, in RUN/best, instead of the newest."""
    device: str = "auto"
    """Where to run: cpu, cuda, ...; auto takes cuda if there is one."""
    json: bool = False
    """Print one JSON object instead of a table."""
    video: str | None = None
    """Also record one episode to this .gif or .mp4 file."""


def main(argv: list[str]) -> int:
    """Evaluate as the options say.

    Returns:
        The exit code: 0, or 2 for bad input.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    options = tyro.cli(Options, description=__doc__, args=argv)
    try:
        if options.video and Path(options.video).suffix not in (".gif", ".mp4"):
            raise ValueError(f"--video takes a .gif or .mp4 file; got {options.video}")
        if options.episodes < 1:  # before a checkpoint is loaded
            raise ValueError(f"--episodes must be >= 1; got {options.episodes}")
        config, pipeline, checkpoint = open_run(options.run, options.checkpoint, options.best, device=options.device)
        if options.video:
            record_video(pipeline.agent.policy, config.env, options.video, seed=options.seed)
        result = evaluate(pipeline.agent.policy, pipeline.env, options.episodes, seed=options.seed)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_json(result) if options.json else as_table(result, f"{config.env}, {checkpoint}"))
    if options.video and not options.json:
        print(f"video: {options.video}")
    return 0


def as_json(result: EvalResult) -> str:
    """The result as one JSON object."""
    return json.dumps(
        {
            "eval_return_mean": result.mean,
            "eval_return_std": result.std,
            "eval_episodes": len(result.returns),
            "returns": list(result.returns),
            "lengths": list(result.lengths),
        }
    )


def as_table(result: EvalResult, title: str) -> str:
    """The spread of the returns as an aligned table."""
    returns = torch.tensor(result.returns, dtype=torch.float64)
    quantiles = {"minimum": 0.0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "maximum": 1.0}
    rows = {"mean ± std": f"{result.mean:10.2f} ± {result.std:.2f}"}
    rows |= {name: f"{returns.quantile(q).item():10.2f}" for name, q in quantiles.items()}
    rows["mean length"] = f"{sum(result.lengths) / len(result.lengths):10.1f} steps"
    return "\n".join(
        [title, f"{len(result.returns)} episodes", *(f"{name:<15}{value}" for name, value in rows.items())]
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrl")
    sys.exit(main(sys.argv[1:]))
