"""Seconds of training until a task is solved: deterministic evaluations in Gymnasium's own environment, seed by seed.

Every seed trains in a process of its own, on one core and one thread. Imports, construction and evaluations do not
count; nor does compilation, which is shown apart: a compiled pipeline is run a few times and put back before it starts.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from timing import aligned, make_room, write_records
from tqdm import tqdm

from fp8rl_torchrl import Pipeline, envs, evaluate
from fp8rl_torchrl.recipes import RecipeConfig, build, config_class
from fp8rl_torchrl.training.memory import keep_freed_memory
from fp8rl_torchrl.training.run_folder import made_with


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, when it counts as solved, and where the records go."""

    algo: str = "ppo"
    """The recipe; its preset for the task is used."""
    env: str = "CartPole-v1"
    """The task."""
    threshold: float = 475.0
    """Solved is the first evaluation whose mean return is at least this."""
    modes: tuple[str, ...] = ("eager", "compiled")
    """eager, compiled, or both; they take turns."""
    precision: str | None = None
    """By default the preset's."""
    seeds: int = 10
    """Seeds, counted from --first-seed."""
    first_seed: int = 0
    """The first seed."""
    eval_every: int = 2048
    """Evaluate after at most this many frames."""
    eval_episodes: int = 20
    """Episodes of each evaluation."""
    max_frames: int = 100_000
    """A seed that is not solved by then counts as infinite."""
    core: int | None = None
    """Pin to this core."""
    out: str | None = None
    """Append a line of JSON for each seed to OUT.jsonl."""


def main(argv: list[str]) -> int:
    """Measure every seed.

    Returns:
        The exit code: 0, or 2 for bad input.
    """
    options = tyro.cli(Options, description=__doc__, args=argv)
    try:
        cells = plan(options)
        if options.out is not None:
            make_room(Path(options.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    records = []
    context = multiprocessing.get_context("spawn")
    for mode, config in tqdm(cells, unit=" runs", dynamic_ncols=True):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            records.append(pool.submit(solve, mode, config, options).result())
        if options.out is not None:
            path = Path(options.out).with_suffix(".jsonl")
            write_records(path, [records[-1] | made_with()])
    print(table(records))
    return 0


def plan(options: Options) -> list[tuple[str, RecipeConfig]]:
    """Every run: modes interleaved within each seed.

    Raises:
        ValueError: If an option is out of range.
    """
    if options.seeds < 1 or options.eval_every < 1 or options.eval_episodes < 1:
        raise ValueError("seeds, eval_every and eval_episodes must be >= 1")
    if unknown := set(options.modes) - {"eager", "compiled"}:
        raise ValueError(f"unknown modes {sorted(unknown)}; use eager and compiled")
    given = {} if options.precision is None else {"precision": options.precision}
    recipe: Any = config_class(options.algo)
    cells = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for mode in options.modes:
            compiled = "on" if mode == "compiled" else "off"
            cells.append((mode, recipe.for_task(options.env, seed=seed, compile=compiled, device="cpu", **given)))
    if any(config.frames_per_collection > options.eval_every for _, config in cells):
        raise ValueError("a collection is longer than eval_every")
    return cells


def solve(mode: str, config: RecipeConfig, options: Options) -> dict[str, Any]:
    """Train one seed until it is solved; runs in a process of its own."""
    torch.set_num_threads(1)
    if options.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    keep_freed_memory()
    judge = envs.make(options.env, num_envs=options.eval_episodes, seed=10_000 + config.seed, native=False)
    pipeline = build(config)
    warmed = warm_up(pipeline) if mode == "compiled" else 0.0
    wall = processor = 0.0
    evaluated, reached = 0, -math.inf
    reports = iter(pipeline)
    while pipeline.frames < options.max_frames:
        started, started_processor = time.perf_counter(), time.process_time()
        report = next(reports, None)
        wall += time.perf_counter() - started
        processor += time.process_time() - started_processor
        if report is None:
            break
        if report.frames + config.frames_per_collection - evaluated > options.eval_every:
            evaluated = report.frames
            reached = evaluate(pipeline.agent.policy, judge, options.eval_episodes).mean
            if reached >= options.threshold:
                break
    solved = reached >= options.threshold
    return {
        "mode": mode,
        "seed": config.seed,
        "seconds": wall if solved else None,
        "processor_seconds": processor if solved else None,
        "compile_seconds": warmed,
        "frames": pipeline.frames,
        "return": reached,
        "config": config.to_dict(),
    }


def warm_up(pipeline: Pipeline) -> float:
    """Compile everything by a few collections and updates, and put the pipeline back to where it was.

    Returns:
        Seconds.
    """
    started = time.perf_counter()
    before = [copy.deepcopy(part.state_dict()) for part in (pipeline.agent, pipeline.step, pipeline.collector)]
    own, random = pipeline.state_dict(), torch.get_rng_state()
    reports = iter(pipeline)
    for _ in range(3):
        next(reports)
    parts: Any = (pipeline.agent, pipeline.step, pipeline.collector)
    for part, state in zip(parts, before, strict=True):
        part.load_state_dict(state)
    pipeline.load_state_dict(own)
    torch.set_rng_state(random)
    return time.perf_counter() - started


def table(records: list[dict[str, Any]]) -> str:
    """Seconds to the threshold by mode: the median, every seed, and what compilation took besides."""
    header = ("mode", "solved", "median s", "min", "max", "processor s", "frames", "compile s")
    rows = []
    for mode in dict.fromkeys(record["mode"] for record in records):
        of_mode = [record for record in records if record["mode"] == mode]
        seconds = [math.inf if r["seconds"] is None else r["seconds"] for r in of_mode]
        processor = [math.inf if r["processor_seconds"] is None else r["processor_seconds"] for r in of_mode]
        solved = sum(map(math.isfinite, seconds))
        numbers = (median(seconds), min(seconds), max(seconds), median(processor))
        frames = median(record["frames"] for record in of_mode)
        compile_seconds = median(record["compile_seconds"] for record in of_mode)
        row = [mode, f"{solved} of {len(of_mode)}", *(f"{number:.2f}" for number in numbers)]
        rows.append((*row, f"{frames:,.0f}", f"{compile_seconds:.1f}"))
    lines = [f"{r['mode']:>8}  seed {r['seed']}  {_seconds(r)}  {r['frames']:,} frames" for r in records]
    return "\n".join([*lines, "", aligned(header, rows)])


def _seconds(record: dict[str, Any]) -> str:
    return "not solved" if record["seconds"] is None else f"{record['seconds']:.2f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
