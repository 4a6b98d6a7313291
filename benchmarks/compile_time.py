"""Measure what FP8 layers cost in TorchRL's losses: compiling them, and one forward and backward pass.

Every cell (one loss, one recipe) runs in a process of its own with an empty compiler cache, pinned to one core; FP32
is always measured, for the ratios. Compiling is counted in processor seconds of the process and of the compilers that
it starts, which other load on the machine disturbs least. What the compiler does once in each process (imports, probing
the tool chain) is done before, on a function of one line, since it would count for both alike and hide the difference.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from timing import make_room
from torchrl_losses import BATCH, LOSSES, batch_for, build, gradients, traces_whole
from tqdm import tqdm

from fp8rl_torchrl.precision.recipe import RECIPES
from fp8rl_torchrl.training.run_folder import made_with

CALLS = 30
"""Timed passes, after compiling; their median counts."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    losses: tuple[str, ...] = LOSSES
    """Losses."""
    recipes: tuple[str, ...] = ("rowwise",)
    """FP8 recipes; FP32 is measured too."""
    actor: tuple[int, ...] = (64, 96, 128)
    """Widths of the actor's hidden layers."""
    critic: tuple[int, ...] = (80, 112, 144)
    """Widths of the critic's."""
    repeats: int = 1
    """Measurements of each cell; their median counts."""
    out: str = "benchmarks/results/compile_time.jsonl"
    """Where the records go, one a measurement."""


def main(argv: list[str]) -> int:
    """Run the measurements.

    Returns:
        The exit code: 0, or 2 for bad input.
    """
    options = tyro.cli(Options, description=__doc__, args=argv)
    out = Path(options.out)
    try:
        cells = plan(options)
        make_room(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment, records = made_with(), []
    context = multiprocessing.get_context("spawn")
    with out.open("w") as file:
        for cell in tqdm(cells, unit=" cells", dynamic_ncols=True):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                records.append(pool.submit(measure, *cell, options.actor, options.critic).result() | environment)
            file.write(json.dumps(records[-1]) + "\n")
            file.flush()
    print(table(records))
    print(f"\nrecords {out}")
    return 0


def plan(options: Options) -> list[tuple[str, str]]:
    """Every cell, a loss and ``fp32`` or a recipe: repeats outermost, so that a drift meets all alike.

    Raises:
        ValueError: If a loss or a recipe is unknown, or the number of repeats out of range.
    """
    for given, known, what in ((options.losses, LOSSES, "loss"), (options.recipes, RECIPES, "recipe")):
        if unknown := set(given) - set(known):
            raise ValueError(f"unknown {what} {', '.join(sorted(unknown))}; use some of {', '.join(known)}")
    if options.repeats < 1:
        raise ValueError(f"repeats must be >= 1; got {options.repeats}")
    cells = [(loss, layers) for loss in options.losses for layers in ("fp32", *options.recipes)]
    return cells * options.repeats


def measure(name: str, layers: str, actor: tuple[int, ...], critic: tuple[int, ...]) -> dict[str, Any]:
    """Compile one loss, forward and backward, and time it; runs in a process of its own.

    Returns:
        The record: processor and wall seconds of compiling, seconds of one pass, eager and compiled, and the graphs.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        from torch._dynamo.utils import counters
        from torch._inductor import config

        config.compile_threads = 1
        torch.compile(lambda x: (x.tanh() + 1).sum())(torch.ones(4, requires_grad=True)).backward()
        torch._dynamo.reset()
        counters.clear()
        loss = build(name, None if layers == "fp32" else layers, actor=actor, critic=critic)
        batch = batch_for(name)
        eager = seconds_of(lambda: gradients(loss, batch))
        compiled = torch.compile(loss, fullgraph=traces_whole(name))
        before, start = processor_seconds(), time.perf_counter()
        gradients(compiled, batch)
        compile_cpu, compile_wall = processor_seconds() - before, time.perf_counter() - start
        stats = counters["stats"]
        return {
            "loss": name,
            "layers": layers,
            "batch": list(BATCH),
            "actor": list(actor),
            "critic": list(critic),
            "compile_cpu_seconds": compile_cpu,
            "compile_wall_seconds": compile_wall,
            "graphs": stats["unique_graphs"],
            "graph_breaks": sum(counters["graph_break"].values()),
            "eager_seconds": eager,
            "compiled_seconds": seconds_of(lambda: gradients(compiled, batch)),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def processor_seconds() -> float:
    """User and system time of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def seconds_of(call: Callable[[], object]) -> float:
    """The median time of a call, after two that are not counted."""
    times = []
    for _ in range(CALLS + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def table(records: list[dict[str, Any]]) -> str:
    """One row a loss and kind of layer: medians over the repeats, and their ratios to FP32."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["loss"], record["layers"]), []).append(record)
    names = ("compile_cpu_seconds", "eager_seconds", "compiled_seconds")
    lines = [
        f"{'loss':<10} {'layers':<14} {'graphs':>6} {'compile, CPU s':>14} {'× FP32':>7} "
        f"{'eager, ms':>10} {'× FP32':>7} {'compiled, ms':>13} {'× FP32':>7}"
    ]
    for (loss, layers), group in groups.items():
        values = [statistics.median(record[name] for record in group) for name in names]
        bases = [statistics.median(record[name] for record in groups[loss, "fp32"]) for name in names]
        ratios = [value / base for value, base in zip(values, bases, strict=True)]
        lines.append(
            f"{loss:<10} {layers:<14} {group[0]['graphs']:>6} {values[0]:>14.1f} {ratios[0]:>7.2f} "
            f"{values[1] * 1e3:>10.2f} {ratios[1]:>7.2f} {values[2] * 1e3:>13.2f} {ratios[2]:>7.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
