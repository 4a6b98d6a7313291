"""Trained frames a second over the number of environments and the width of the networks, and where the time goes.

Each cell is a process of its own on one core with one thread. The whole iteration and its parts, measured apart on the
same shapes, take turns: "env" is the dynamics and auto-reset with fixed actions, "policy" the collecting policy,
"replay" storing and sampling (nothing in a2c), "update" the updates; "rest" is what the whole takes beyond them:
storing the steps, counting episodes. Below 0, the parts cost more apart than together.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from cells import ALGORITHMS, PARTS, Cell, Runner, broken, budget, run_all
from layers import device_name, device_of
from peers import allocator, pinned_core
from timing import aligned, make_room, write_records
from tqdm import tqdm

from fp8rl_torchrl import Precision
from fp8rl_torchrl.training.run_folder import made_with


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    algo: str = "a2c"
    """a2c or actor-critic."""
    env: str = "CustomEnv"
    """A native environment: CustomEnv or CartPole-v1."""
    num_envs: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
    """Numbers of environments."""
    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    """Widths of both hidden layers."""
    steps: int = 8
    """Of each environment in a collection."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """What the update computes in; fp8 is worth naming on a GPU."""
    replay_size: int = 10_000
    """Transitions in the actor-critic's (full) buffer; at least a collection."""
    compile: bool = True
    """Whether everything is compiled (and captured, on a GPU)."""
    repeats: int = 5
    """Turns of each part; their median counts."""
    seconds: float = 0.3
    """About how long a turn lasts."""
    minutes: float | None = None
    """Begin no cell after this time. The smallest come first."""
    limit: float = 600.0
    """Seconds after which a cell is ended; larger ones are then left out."""
    max_memory_gib: float = 12.0
    """What a cell may allocate on a CPU; larger ones are then left out."""
    core: int | None = None
    """The core to pin to; default: the last one that this process may use."""
    seed: int = 0
    """Of everything random."""
    device: str = "auto"
    """Where to run: auto is cuda if there is one."""
    out: str = "benchmarks/results/train_throughput"
    """Records are appended to OUT.jsonl, one a cell; the picture is OUT.png."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.algo not in ALGORITHMS:
            raise ValueError(f"unknown algo {self.algo!r}; use one of {', '.join(ALGORITHMS)}")
        if self.env not in ("CustomEnv", "CartPole-v1"):
            raise ValueError(f"env must be CustomEnv or CartPole-v1, which can be fused; got {self.env!r}")
        for precision in self.precisions:
            Precision(precision)
        if not (self.num_envs and self.widths and self.precisions):
            raise ValueError("num-envs, widths and precisions must each name at least one")
        if min((*self.num_envs, *self.widths, self.steps, self.repeats, self.replay_size)) < 1:
            raise ValueError("num-envs, widths, steps, repeats and replay-size must be >= 1")
        if min(self.limit, self.max_memory_gib, self.seconds) <= 0:
            raise ValueError("limit, max-memory-gib and seconds must be > 0")


def main(argv: list[str]) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0, also where cells were too large; 1 if one failed otherwise; 2 for bad input.
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
    cells = cells_of(options, device)
    environment, records = made_with() | {"allocator": allocator()}, []
    print(f"{device_name(device, environment)}; {options.algo}, {options.env}, {options.steps} steps a collection")
    runner = Runner(
        core=core,
        repeats=options.repeats,
        seconds=options.seconds,
        limit=options.limit,
        max_memory_gib=options.max_memory_gib,
    )
    config = asdict(options) | {"device": str(device), "core": core}
    results = run_all(cells, runner, budget(options.minutes))
    for result in tqdm(results, total=len(cells), unit=" cells", dynamic_ncols=True):
        records.append({"config": config} | result | environment)
        write_records(out.with_suffix(".jsonl"), records[-1:])
    print(table(records))
    plot(records, out.with_suffix(".png"), f"{options.algo} on {options.env}, {device_name(device, environment)}")
    if skipped := [record for record in records if (record["failure"] or "").startswith("not begun")]:
        names = (f"{r['cell']['num_envs']}×{r['cell']['width']} {r['cell']['precision']}" for r in skipped)
        print(f"not measured (environments × width): {', '.join(names)}")
    print(f"\n{len(records)} records appended to {out.with_suffix('.jsonl')}, picture {out.with_suffix('.png')}")
    for failure in (failures := broken(records)):
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def cells_of(options: Options, device: torch.device) -> list[Cell]:
    """One cell for each number of environments, width and precision."""
    replayed = options.algo == "actor-critic"
    return [
        Cell(
            algo=options.algo,
            env=options.env,
            num_envs=num_envs,
            steps=options.steps,
            width=width,
            precision=precision,
            compile=options.compile,
            replay_size=max(options.replay_size, num_envs * options.steps) if replayed else 0,
            device=str(device),
            seed=options.seed,
        )
        for precision in options.precisions
        for width in options.widths
        for num_envs in options.num_envs
    ]


def table(records: list[dict[str, Any]]) -> str:
    """One row a cell: frames/s, ns a frame by part, the memory at its peak and before anything was built."""

    def row(record: dict[str, Any]) -> tuple[str, ...]:
        cell = record["cell"]
        head = (f"{cell['num_envs']:,}", str(cell["width"]), cell["precision"])
        if record["failure"]:
            return (*head, record["failure"][:48], *[""] * (len(PARTS) + 4))
        ns = record["ns_per_frame"]
        memory = [f"{record[name] / 2**20:.0f}" for name in ("memory_peak_bytes", "memory_start_bytes")]
        return (
            *head,
            f"{record['frames_per_second']:,.0f}",
            *(f"{ns[part]:.4g}" for part in ("total", *PARTS)),
            *memory,
            f"{record['compile_seconds']:.0f}",
        )

    header = ("envs", "width", "precision", "frames/s", "ns/frame", *PARTS, "peak MiB", "before MiB", "compiling s")
    ordered = sorted(records, key=lambda r: (r["cell"]["precision"], r["cell"]["width"], r["cell"]["num_envs"]))
    return aligned(header, [row(record) for record in ordered])


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the ns a frame by part, and each part's share, over the number of environments: a column a width."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [record for record in records if record["failure"] is None]
    if not shown:
        return
    precisions = list(dict.fromkeys(r["cell"]["precision"] for r in shown))
    widths = sorted({r["cell"]["width"] for r in shown})
    figure = Figure(figsize=(2 + 3 * len(widths), 1 + 4.2 * len(precisions)), dpi=150, layout="constrained")
    grid = figure.subplots(2 * len(precisions), len(widths), sharey="row", squeeze=False)
    colors = dict(zip(PARTS, colormaps["viridis"]([0.0, 0.3, 0.55, 0.8, 1.0]), strict=True))
    for down, precision in enumerate(precisions):
        for across, width in enumerate(widths):
            line = [r for r in shown if (r["cell"]["precision"], r["cell"]["width"]) == (precision, width)]
            line.sort(key=lambda r: r["cell"]["num_envs"])
            envs = [r["cell"]["num_envs"] for r in line]
            above, below = grid[2 * down][across], grid[2 * down + 1][across]
            above.plot(envs, [r["ns_per_frame"]["total"] for r in line], "ko-", markersize=3, label="total")
            bottom = [0.0] * len(line)
            for part in PARTS:
                # On a logarithmic axis there is no place for what is 0 or less.
                values = [ns if (ns := r["ns_per_frame"][part]) > 0 else float("nan") for r in line]
                above.plot(envs, values, color=colors[part], marker=".", linewidth=1, label=part)
                heights = [share(r["ns_per_frame"], part) for r in line]
                places = [str(n) for n in envs]
                below.bar(places, heights, bottom=bottom, color=colors[part], edgecolor="gray", linewidth=0.3)
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            above.set_xscale("log", base=2)
            above.set_yscale("log")
            above.grid(alpha=0.3)
            above.set_title(f"width {width}, {precision}", fontsize=9)
            below.set_xlabel("environments", fontsize=8)
            below.tick_params(axis="x", rotation=60)
            if across == 0:
                above.set_ylabel("ns per trained frame", fontsize=8)
                below.set_ylabel("share of the parts, %", fontsize=8)
            for axes in (above, below):
                axes.tick_params(labelsize=7)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"Time per trained frame: {title}", fontsize=10)
    figure.savefig(path)


def share(ns: dict[str, float], part: str) -> float:
    """A part's percentage of all parts; a rest below 0 counts as 0."""
    return 100 * max(0.0, ns[part]) / sum(max(0.0, ns[name]) for name in PARTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
