"""Compare precision modes: train the same task in each, over several seeds, and show what each costs and gains.

Every cell (one precision, one seed) trains in a process of its own, so that its peak memory and its time are its own.
Seeds are interleaved over the modes, so that a drift of the machine's speed meets all of them alike.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import platform
import resource
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from fp8rl_torchrl import evaluate
from fp8rl_torchrl.recipes import ActorCriticConfig, build
from fp8rl_torchrl.training.run_folder import made_with

SOLVED = 215.0
"""Mean return from which CustomEnv counts as solved."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and where the results go."""

    modes: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp8")
    """Precision modes."""
    rollout_precision: str | None = None
    """What the policy collects in; by default fp32, and for an fp8 mode the same as the loss."""
    seeds: int = 5
    """Seeds of each mode, counted from --first-seed."""
    first_seed: int = 1000
    """The first seed."""
    env: str = "CustomEnv"
    """The task."""
    episodes: int = 2000
    """Training episodes of each run."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the network's layers."""
    eval_episodes: int = 100
    """Episodes of the evaluation at the end."""
    device: str = "auto"
    """Where to run."""
    out: str = "benchmarks/results/precision_modes"
    """Results go to OUT.jsonl (a record a run) and OUT.png."""


def main(argv: list[str]) -> int:
    """Run the comparison.

    Returns:
        The exit code: 0, or 2 for bad input.
    """
    options = tyro.cli(Options, description=__doc__, args=argv)
    out = Path(options.out)
    try:
        cells = plan(options)
        out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment = made_with()
    records = []
    # A process each: memory and thread pools of one run must not show in the next.
    context = multiprocessing.get_context("spawn")
    with out.with_suffix(".jsonl").open("w") as file:
        for config in tqdm(cells, unit=" runs", dynamic_ncols=True):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                record = pool.submit(train_one, config, options.eval_episodes).result()
            records.append(record | environment)
            file.write(json.dumps(records[-1]) + "\n")
            file.flush()
    print(table(records))
    plot(records, out.with_suffix(".png"))
    print(f"\nrecords {out.with_suffix('.jsonl')}, picture {out.with_suffix('.png')}")
    return 0


def plan(options: Options) -> list[ActorCriticConfig]:
    """Every run's configuration: modes interleaved within each seed.

    Raises:
        ValueError: If an option is out of range.
    """
    if options.seeds < 1:
        raise ValueError(f"seeds must be >= 1; got {options.seeds}")
    base = ActorCriticConfig(env=options.env, episodes=options.episodes, hidden=options.hidden, device=options.device)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = ((seed, mode) for seed in seeds for mode in options.modes)
    return [
        replace(base, precision=mode, rollout_precision=options.rollout_precision, seed=seed).resolved()
        for seed, mode in runs
    ]


def train_one(config: ActorCriticConfig, eval_episodes: int) -> dict[str, Any]:
    """Train and evaluate one configuration; runs in a process of its own.

    Returns:
        The record: configuration, conversion to FP8, learning curve, returns, seconds, peak memory in MiB, skipped
        steps, and the largest gap between the distributions of rollout and learner.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrl")
    torch.set_num_threads(config.num_threads)
    pipeline = build(config)
    on_cuda = config.device.startswith("cuda")
    curve, gaps = [], []
    for report in pipeline:
        curve.append((report.frames, report.episode_return))
        if "rollout_kl" in report.metrics:
            gaps.append((report.metrics["rollout_kl"], report.metrics["rollout_ratio_error"]))
    largest_kl, largest_ratio_error = map(max, zip(*gaps, strict=True)) if gaps else (None, None)
    result = evaluate(pipeline.agent.policy, pipeline.env, eval_episodes)
    if on_cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        unit = 2**20 if platform.system() == "Darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {
        "config": config.to_dict(),
        "conversion": pipeline.conversion.to_dict() if pipeline.conversion else None,
        "curve": [point for point in curve if point[1] == point[1]],
        "eval_return_mean": result.mean,
        "eval_return_std": result.std,
        "train_seconds": pipeline.seconds,
        "frames": pipeline.frames,
        "updates": int(pipeline.step.updates),
        "skipped_steps": int(pipeline.step.skipped_steps),
        "rollout_kl_max": largest_kl,
        "rollout_ratio_error_max": largest_ratio_error,
        "peak_memory_mib": peak,
        "memory_of": "device" if on_cuda else "process",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def by_mode(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each precision mode, in the order of first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["config"]["precision"], []).append(record)
    return groups


def table(records: list[dict[str, Any]]) -> str:
    """One row a mode, with the spread over seeds, then the return of every seed."""
    groups = by_mode(records)
    width = max(map(len, ("mode", *groups)))
    lines = [
        f"{'mode':<{width}} {'seeds':>5} {'return: mean':>12} {'min':>7} {'max':>7} {'solved':>7} "
        f"{'seconds: median':>15} {'min':>6} {'max':>6} {'peak MiB':>9} {'skipped':>8} {'FP8 share':>9} "
        f"{'products':>8} {'max |ratio-1|':>13}"
    ]
    for mode, group in groups.items():
        returns = [record["eval_return_mean"] for record in group]
        seconds = [record["train_seconds"] for record in group]
        solved = f"{sum(value >= SOLVED for value in returns)}/{len(returns)}"
        lines.append(
            f"{mode:<{width}} {len(group):>5} "
            f"{statistics.mean(returns):>12.1f} {min(returns):>7.1f} {max(returns):>7.1f} "
            f"{solved:>7} {statistics.median(seconds):>15.1f} {min(seconds):>6.1f} {max(seconds):>6.1f} "
            f"{statistics.median(r['peak_memory_mib'] for r in group):>9.0f} "
            f"{sum(r['skipped_steps'] for r in group):>8} {_share(group[0]):>9} "
            f"{(group[0]['conversion'] or {'backend': '-'})['backend']:>8} "
            f"{max(r['rollout_ratio_error_max'] or 0.0 for r in group):>13.2g}"
        )
    lines.append("")
    for mode, group in groups.items():
        each = "  ".join(f"{record['config']['seed']}: {record['eval_return_mean']:.1f}" for record in group)
        lines.append(f"{mode:<{width}} return by seed  {each}")
    return "\n".join(lines)


def _share(record: dict[str, Any]) -> str:
    """The part of the linear layers' multiply-adds that ran in FP8."""
    return f"{record['conversion']['fp8_share']:.0%}" if record["conversion"] else "-"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Learning curves, final returns and training time of each mode, a mark a seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    groups = by_mode(records)
    figure = Figure(figsize=(11, 3.8), dpi=150, layout="constrained")
    curves, finals, times = figure.subplots(1, 3, width_ratios=(2.2, 1, 1))
    for place, (mode, group) in enumerate(groups.items()):
        color = f"C{place}"
        for seed, record in enumerate(group):
            label = mode if seed == 0 else None
            curves.plot(*zip(*record["curve"], strict=True), color=color, alpha=0.7, linewidth=1, label=label)
        for axes, name in ((finals, "eval_return_mean"), (times, "train_seconds")):
            values = [record[name] for record in group]
            offsets = [place + 0.08 * (seed - (len(values) - 1) / 2) for seed in range(len(values))]
            axes.plot(offsets, values, "o", color=color, markersize=4)
            axes.hlines(statistics.median(values), place - 0.3, place + 0.3, color=color)
    config, count = records[0]["config"], len(next(iter(groups.values())))
    curves.set(xlabel="environment steps (frames)", ylabel="return, mean of the last 100 episodes")
    curves.set_title(f"training, {count} seeds a mode")
    curves.xaxis.set_major_formatter(EngFormatter(sep=""))
    finals.set(title="evaluation (line: median)", ylabel="mean return per episode")
    if config["env"] == "CustomEnv":
        for axes in (curves, finals):
            axes.axhline(SOLVED, color="gray", linestyle=":", linewidth=1, label=f"solved: {SOLVED:g}")
    curves.legend(loc="lower right")
    times.set(title="time (line: median)", ylabel="training time, s")
    times.set_ylim(bottom=0)
    for axes in (finals, times):
        axes.set_xticks(range(len(groups)), [mode.replace("-", "-\n", 2) for mode in groups], fontsize="small")
        axes.set_xlim(-0.6, len(groups) - 0.4)
    for axes in (curves, finals, times):
        axes.grid(alpha=0.3)
    hidden = "×".join(map(str, config["hidden"]))
    emulated = any(record["conversion"] and record["conversion"]["backend"] == "emulated" for record in records)
    note = "; FP8 emulated, so its time is no measure of FP8 hardware" if emulated else ""
    figure.suptitle(f"{config['env']}, actor-critic {hidden}, {config['device']}{note}")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
