"""What does `fp8rl_torchrl.numerics.Recorder` cost? Training with it and without, in turns, on one core.

Each turn trains the same recipe for the same number of collections, once with the recorder looking at one update in a
hundred and once without; the cost is the median over turns of the ratio of processor times. The target is under 3 %.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from peers import pinned_core
from timing import aligned, ratios, take_turns, write_records
from tqdm import tqdm

from fp8rl_torchrl import Pipeline
from fp8rl_torchrl.numerics import Recorder
from fp8rl_torchrl.recipes import build, config_class
from fp8rl_torchrl.training.memory import keep_freed_memory
from fp8rl_torchrl.training.run_folder import made_with

TARGET = 0.03
CASES = (("actor-critic", "CustomEnv"), ("ppo", "CartPole-v1"), ("dqn", "CartPole-v1"), ("sac", "Pendulum-v1"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    precisions: tuple[str, ...] = ("fp32", "bf16", "fp8")
    """Precisions."""
    compile: tuple[str, ...] = ("off", "on")
    """Eager updates, compiled ones or both."""
    every: int = 100
    """One update in so many is looked at."""
    turns: int = 9
    """Turns of each; medians count."""
    updates: int = 400
    """About how many updates a turn makes."""
    core: int | None = None
    """The core to pin to; default: the last one that this process may use."""
    out: str = "benchmarks/results/recorder_cost"
    """Results go to OUT.jsonl (a record a case, appended)."""


def main(argv: list[str]) -> int:
    """Measure every case.

    Returns:
        The exit code: 0 if all cost less than the target, 1 if not, 2 for bad input.
    """
    options = tyro.cli(Options, description=__doc__, args=argv)
    try:
        core = pinned_core(options.core)
        cases = [(*case, p, c) for case in CASES for p in options.precisions for c in options.compile]
        for case in cases:
            configured(*case)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if core is not None:
        import os

        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()  # as scripts/train.py does
    path, rows, dear = Path(options.out).with_suffix(".jsonl"), [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in tqdm(cases, unit=" cases", dynamic_ncols=True):
        found = measured(case, options)
        dear += found["ratio"]["median"] > 1 + TARGET
        write_records(path, [found | made_with()])
        cost = {name: f"{value - 1:+.1%}" for name, value in found["ratio"].items()}
        rows.append((*case, cost["median"], cost["min"], cost["max"], f"{1e6 * found['seconds_an_update']:.0f}"))
    header = ("recipe", "task", "precision", "compiled", "cost: median", "min", "max", "µs an update, all in")
    print(aligned(header, rows))
    print(f"\n{dear} of {len(rows)} cost more than {TARGET:.0%}; records: {path}")
    return 1 if dear else 0


def configured(algo: str, env: str, precision: str, compile: str) -> Any:
    """The recipe's preset, without an end."""
    options: dict[str, Any] = {"total_frames": 10**12, "lr_decay_updates": 10**9, "precision": precision}
    return config_class(algo).for_task(
        env, device="cpu", num_threads=1, compile=compile, collector="torchrl", **options
    )


def measured(case: tuple[str, str, str, str], options: Options) -> dict[str, Any]:
    """Train with the recorder and without, in turns.

    Returns:
        ``ratio`` (median, min, max of the processor times, turn by turn) and ``seconds_an_update``, everything in.
    """
    pipelines = {name: build(configured(*case)) for name in ("without", "with")}
    Recorder(options.every).attach(pipelines["with"])
    steps = {name: _training(pipeline, options.updates) for name, pipeline in pipelines.items()}
    times, failures = take_turns(steps, torch.device("cpu"), repeats=options.turns, seconds=0.0)
    if failures:
        raise RuntimeError("; ".join(f"{name}: {failure}" for name, failure in failures.items()))
    names = ("algo", "env", "precision", "compile")
    return {
        **dict(zip(names, case, strict=True)),
        "every": options.every,
        "seconds": times,
        "ratio": ratios(times["with"], times["without"]),
        "seconds_an_update": sorted(times["without"])[options.turns // 2] / options.updates,
    }


def _training(pipeline: Pipeline, updates: int) -> Any:
    reports = iter(pipeline)
    while int(pipeline.step.updates) == 0:  # replay fills first
        next(reports)

    def train() -> None:
        end = int(pipeline.step.updates) + updates
        while int(pipeline.step.updates) < end:
            next(reports)

    return train


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
