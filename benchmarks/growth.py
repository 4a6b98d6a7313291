"""The cost of growth: frames/s and peak memory over environments, width and replay buffer; and whether memory is flat.

Each size is a cell in a process of its own, as in `train_throughput.py`, whose records are used where they were made
with the same commit and hardware. Time and memory may grow with the number of environments and of transitions, and with
the square of the width (the number of weights); where they grow by more, it is said.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from cells import Cell, Runner, broken, budget, read_records, run_all
from layers import device_name, device_of
from peers import allocator, pinned_core
from timing import aligned, make_room, write_records
from tqdm import tqdm

from fp8rl_torchrl import Precision
from fp8rl_torchrl.training.run_folder import made_with

AXES = {"num_envs": "environments", "width": "width of both layers", "replay_size": "transitions in the buffer"}
PROPORTIONAL = {"num_envs": 1, "width": 2, "replay_size": 1}
"""The power of each size that the work is proportional to: there are as many weights as the width squared."""
TOLERANCE = 0.15
"""Above the proportional exponent by more than this, growth is superlinear."""
NOISE = 16 * 2**20
"""Bytes: memory below this is taken to be this, since the allocator's own comes and goes."""
FLAT = 0.01


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    num_envs: tuple[int, ...] = (64, 256, 1024, 4096, 16384, 65536)
    """Numbers of environments, in a2c at width 64."""
    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    """Widths, in a2c with 1024 environments."""
    replay_sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    """Transitions in the buffer of the actor-critic, with 125 environments at width 64."""
    steps: int = 8
    """Of each environment in a collection."""
    precision: str = "fp32"
    """What the update computes in."""
    compile: bool = True
    """Whether everything is compiled (and captured, on a GPU)."""
    repeats: int = 5
    """Turns of each part; their median counts."""
    seconds: float = 0.3
    """About how long a turn lasts."""
    flat_minutes: float = 0.0
    """Also train a2c for so long, and see whether its resident memory grows; 0 does not."""
    minutes: float | None = None
    """Begin no size after this time. The smallest come first."""
    limit: float = 600.0
    """Seconds after which a size is ended; larger ones are then left out."""
    max_memory_gib: float = 12.0
    """What one may allocate on a CPU; larger ones are then left out."""
    core: int | None = None
    """The core to pin to; default: the last one that this process may use."""
    seed: int = 0
    """Of everything random."""
    device: str = "auto"
    """Where to run: auto is cuda if there is one."""
    records: str = "benchmarks/results/train_throughput.jsonl"
    """Records of train_throughput.py, used for the sizes that they hold."""
    out: str = "benchmarks/results/growth"
    """Records are appended to OUT.jsonl, one a size; the picture is OUT.png."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        Precision(self.precision)
        sizes = (*self.num_envs, *self.widths, *self.replay_sizes)
        if not sizes and not self.flat_minutes:
            raise ValueError("name at least one size, or flat-minutes")
        if min((*sizes, self.steps, self.repeats), default=1) < 1:
            raise ValueError("num-envs, widths, replay-sizes, steps and repeats must be >= 1")
        if min(self.limit, self.max_memory_gib, self.seconds) <= 0 or self.flat_minutes < 0:
            raise ValueError("limit, max-memory-gib and seconds must be > 0, flat-minutes >= 0")
        if self.replay_sizes and min(self.replay_sizes) < 125 * self.steps:
            raise ValueError(f"replay-sizes must hold a collection of 125 × {self.steps} transitions")


def main(argv: list[str]) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0, also where growth is superlinear; 1 if a size failed otherwise than for lack of memory or
        time; 2 for bad input.
    """
    try:
        options = tyro.cli(Options, description=__doc__, args=argv)
        device = device_of(options.device)
        core = pinned_core(options.core)
        out = Path(options.out)
        make_room(out)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment = made_with() | {"allocator": allocator()}
    config = asdict(options) | {"device": str(device), "core": core}
    columns = columns_of(options, device)
    wanted = {cell for cells in columns.values() for cell in cells}
    known = {
        cell: record
        for cell, record in read_records(Path(options.records)).items()
        if cell in wanted and all(record[name] == environment[name] for name in ("commit", "hardware", "allocator"))
    }
    print(f"{device_name(device, environment)}; {len(known)} of {len(wanted)} sizes are in {options.records}")
    runner = Runner(
        core=core,
        repeats=options.repeats,
        seconds=options.seconds,
        limit=options.limit,
        max_memory_gib=options.max_memory_gib,
    )
    file, measured = out.with_suffix(".jsonl"), list(known.values())
    missing = wanted - set(known)
    results = run_all(missing, runner, budget(options.minutes))
    write_records(file, measured)
    for result in tqdm(results, total=len(missing), unit=" sizes", dynamic_ncols=True):
        measured.append({"config": config} | result | environment)
        write_records(file, measured[-1:])
    found = {Cell(**record["cell"]): record for record in measured}
    print(table(columns, found))
    for words in superlinear(columns, found):
        print(words)
    plot(columns, found, out.with_suffix(".png"), f"{options.precision} on {device_name(device, environment)}")
    if options.flat_minutes:
        cell = base_cell(options, device)
        flat = {"config": config, "flat": asdict(cell)} | judged(runner.run(cell, options.flat_minutes))
        print(flat["words"])
        write_records(file, [flat | environment])
        measured.append(flat)
    print(f"\n{len(measured)} records appended to {file}, picture {out.with_suffix('.png')}")
    for failure in (failures := broken(measured)):
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def base_cell(options: Options, device: torch.device) -> Cell:
    """What the cells have in common: a2c with 1,024 environments at width 64."""
    return Cell(
        steps=options.steps,
        precision=options.precision,
        compile=options.compile,
        device=str(device),
        seed=options.seed,
    )


def columns_of(options: Options, device: torch.device) -> dict[str, list[Cell]]:
    """The cells of each axis, in its order."""
    base = base_cell(options, device)
    replayed = replace(base, algo="actor-critic", num_envs=125)  # 1,000 frames a collection fit in the smallest buffer
    return {
        "num_envs": [replace(base, num_envs=size) for size in sorted(options.num_envs)],
        "width": [replace(base, width=size) for size in sorted(options.widths)],
        "replay_size": [replace(replayed, replay_size=size) for size in sorted(options.replay_sizes)],
    }


def collection_seconds(record: dict[str, Any]) -> float:
    """The time of one collection and its updates, in s."""
    return statistics.median(record["seconds"]["total"])


def memory(record: dict[str, Any]) -> float:
    """What a cell's memory has grown by since the program was imported, at its peak, in bytes."""
    return max(NOISE, record["memory_peak_bytes"] - record["memory_start_bytes"])


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {"time": collection_seconds, "memory": memory}


def exponents(sizes: list[int], values: list[float]) -> list[float]:
    """Between each two neighbours: the power of the size that the value grows with."""
    pairs = list(zip(sizes, values, strict=True))
    return [math.log(w / v) / math.log(n / m) for (m, v), (n, w) in pairwise(pairs)]


def superlinear(columns: dict[str, list[Cell]], found: dict[Cell, dict[str, Any]]) -> list[str]:
    """In words, wherever time or memory grows by more than the work; or that this is nowhere so."""
    said = []
    for axis, cells in columns.items():
        records = [found[cell] for cell in cells if cell in found and found[cell]["failure"] is None]
        sizes = [record["cell"][axis] for record in records]
        for name, measure in MEASURES.items():
            each = exponents(sizes, [measure(record) for record in records])
            for low, high, exponent in zip(sizes, sizes[1:], each, strict=False):
                if exponent > PROPORTIONAL[axis] + TOLERANCE:
                    said.append(
                        f"superlinear: from {low:,} to {high:,} {AXES[axis]}, {name} grows with the power "
                        f"{exponent:.2f}, and the work with {PROPORTIONAL[axis]}"
                    )
    return said or ["nothing grows by more than the work does"]


def table(columns: dict[str, list[Cell]], found: dict[Cell, dict[str, Any]]) -> str:
    """One row a size; the powers are those from the size above it."""
    rows = []
    for axis, cells in columns.items():
        before: dict[str, Any] | None = None
        for cell in cells:
            record = found.get(cell)
            if record is None or record["failure"]:
                rows.append((axis, f"{getattr(cell, axis):,}", (record or {}).get("failure", "-")[:48], *[""] * 4))
                continue
            sizes = [r["cell"][axis] for r in (before, record) if r is not None]
            powers = [exponents(sizes, [m(r) for r in (before, record) if r is not None]) for m in MEASURES.values()]
            rows.append(
                (
                    axis,
                    f"{getattr(cell, axis):,}",
                    f"{record['frames_per_second']:,.0f}",
                    f"{1e3 * collection_seconds(record):.4g}",
                    f"{record['memory_peak_bytes'] / 2**20:,.0f}",
                    *(f"{power[0]:.2f}" if power else "-" for power in powers),
                )
            )
            before = record
    return aligned(("axis", "size", "frames/s", "ms", "peak MiB", "power of ms", "power of memory"), rows)


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """Whether the memory of a long run is flat: the means of the first and last tenth of the samples, and in words."""
    if result["failure"]:
        return result | {"flat_to_1_percent": None, "words": f"memory over time: {result['failure']}"}
    samples = result["samples"]
    tenth = max(1, len(samples) // 10)
    first, last = statistics.mean(samples[:tenth]), statistics.mean(samples[-tenth:])
    change = last / first - 1
    flat = abs(change) < FLAT
    words = (
        f"resident memory over {result['train_seconds']:.0f} s of training ({result['frames']:,} frames): "
        f"{first / 2**20:.1f} MiB at first, {last / 2**20:.1f} MiB at last, {change:+.2%}: "
        + ("flat to 1 %" if flat else "NOT flat to 1 %")
    )
    return result | {"first_bytes": first, "last_bytes": last, "flat_to_1_percent": flat, "words": words}


def plot(columns: dict[str, list[Cell]], found: dict[Cell, dict[str, Any]], path: Path, title: str) -> None:
    """Frames/s above, peak memory below, a column an axis; each with the power it grows with from end to end."""
    from matplotlib.figure import Figure

    measured = {
        axis: [found[cell] for cell in cells if cell in found and found[cell]["failure"] is None]
        for axis, cells in columns.items()
    }
    measured = {axis: records for axis, records in measured.items() if records}
    if not measured:
        return
    figure = Figure(figsize=(2 + 3 * len(measured), 6), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(measured), sharey="row", squeeze=False)
    for across, (axis, records) in enumerate(measured.items()):
        sizes = [record["cell"][axis] for record in records]
        shown = (
            ("frames/s", [record["frames_per_second"] for record in records]),
            ("peak memory, MiB", [record["memory_peak_bytes"] / 2**20 for record in records]),
        )
        for down, (name, values) in enumerate(shown):
            axes = grid[down][across]
            axes.plot(sizes, values, "o-", markersize=4, label=records[0]["cell"]["algo"])
            axes.legend(fontsize=8)
            if len(sizes) > 1:
                ends = exponents([sizes[0], sizes[-1]], [values[0], values[-1]])[0]
                last = exponents(sizes, values)[-1]
                axes.set_title(f"slope {ends:+.2f} (at the end {last:+.2f})", fontsize=9)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            axes.tick_params(labelsize=8)
            if across == 0:
                axes.set_ylabel(name, fontsize=9)
        grid[1][across].set_xlabel(AXES[axis], fontsize=9)
    figure.suptitle(f"The cost of growth, {title}", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
