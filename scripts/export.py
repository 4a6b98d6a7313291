"""Export the policy of a training run to a file for deployment, and check the file against the policy.

The file maps observations [batch, ...] to deterministic actions. --out policy.pt2 is for torch.export.load,
--out policy.onnx for ONNX Runtime (extra "export").
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from fp8rl_torchrl.recipes.saved_run import open_run
from fp8rl_torchrl.training.export import collect_observations, export_policy
from fp8rl_torchrl.training.policy_file import checked_format


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and how."""

    run: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    out: str
    """The file to write, ending in .pt2 or .onnx."""
    format: Literal["torch", "onnx"] | None = None
    """torch (a .pt2 file of torch.export) or onnx; by default what the file's ending says."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 halves the weights; heads stay in fp32, and so do the file's inputs and outputs."""
    tolerance: float | None = None
    """The largest difference from the policy, as a part of the largest value: 1e-4, or 5e-2 for bf16."""
    checkpoint: str | None = None
    """The folder of a checkpoint; by default the newest in RUN/checkpoints."""
    best: bool = False
    """Take the policy of the run's best periodic evaluation, in RUN/best, instead of the newest."""
    episodes: int = 10
    """Number of complete episodes whose observations the file is checked on."""
    seed: int = 1_000_003
    """Seed of these episodes."""
    overwrite: bool = False
    """Replace the file if it exists."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> int:
    """Export as the options say.

    Returns:
        The exit code: 0, or 2 for bad input or a file that does not do what the policy does.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    options = tyro.cli(Options, description=__doc__, args=argv)
    try:
        checked_format(options.out, options.format, overwrite=options.overwrite)
        # The file is for any machine; what a GPU run was fast with has no bearing on its policy.
        anywhere = {"device": "cpu", "compile": "off", "cudagraph": "off", "fp8_backend": "auto"}
        config, pipeline, checkpoint = open_run(options.run, options.checkpoint, options.best, **anywhere)
        policy: Any = pipeline.agent.policy
        observations = collect_observations(policy, pipeline.env, options.episodes, seed=options.seed)
        report = export_policy(
            policy,
            observations,
            options.out,
            format=options.format,
            precision=options.precision,
            tolerance=options.tolerance,
            overwrite=options.overwrite,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict()) if options.json else f"{config.env}, {checkpoint}\n{report}")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrl")
    sys.exit(main(sys.argv[1:]))
