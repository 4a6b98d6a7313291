"""What does `fp8rl_torchrl.numerics.Recorder` cost? Its own time while a recipe trains on one core.

A recipe trains with the recorder looking at one update in a hundred. What a look costs is the processor time that an
update with one, and the update after it (whose caches are cold), take beyond two others; to that comes what the
recorder does after each collection. All of it is set in relation to the time of everything else. (Training with and
without, in turns, says the same, but the machine's noise of some percent hides the answer.) The target is under 3 %.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from peers import pinned_core
from tensordict import TensorDict, TensorDictBase
from timing import aligned, make_room, write_records
from tqdm import tqdm

from fp8rl_torchrl.numerics import Recorder
from fp8rl_torchrl.recipes import build, config_class
from fp8rl_torchrl.training.memory import keep_freed_memory
from fp8rl_torchrl.training.run_folder import made_with

TARGET = 0.03
WARM_UP = 2
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
    looks: int = 25
    """Updates to look at, in each case; medians count."""
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
        if options.every < 3 or options.looks < 2:
            raise ValueError(f"--every must be >= 3 and --looks >= 2; got {options.every} and {options.looks}")
        path = Path(options.out).with_suffix(".jsonl")
        make_room(Path(options.out))
        core = pinned_core(options.core)
        cases = [(*case, p, c) for case in CASES for p in options.precisions for c in options.compile]
        for case in cases:
            configured(*case)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()  # as scripts/train.py does
    rows, dear = [], 0
    for case in tqdm(cases, unit=" cases", dynamic_ncols=True):
        found = measured(case, options)
        dear += found["cost"]["median"] > TARGET
        write_records(path, [found | made_with()])
        cost = [f"{found['cost'][name]:.1%}" for name in ("median", "lower quartile", "upper quartile")]
        micros = [f"{1e6 * found[name]:.0f}" for name in ("seconds_a_look", "seconds_an_update")]
        rows.append((*case, *cost, *micros))
    header = ("recipe", "task", "precision", "compiled", "cost: median", "quartiles: 1st", "3rd")
    print(aligned((*header, "µs a look", "µs an update, all in"), rows))
    print(f"\n{dear} of {len(rows)} cost more than {TARGET:.0%}; records: {path}")
    return 1 if dear else 0


def configured(algo: str, env: str, precision: str, compile: str) -> Any:
    """The recipe's preset, without an end."""
    options: dict[str, Any] = {"total_frames": 10**12, "lr_decay_updates": 10**9, "precision": precision}
    return config_class(algo).for_task(
        env, device="cpu", num_threads=1, compile=compile, collector="torchrl", **options
    )


def measured(case: tuple[str, str, str, str], options: Options) -> dict[str, Any]:
    """Train with the recorder, and time what it does.

    Returns:
        ``cost`` (median and quartiles over the looks; a part of everything else), ``seconds_a_look`` (median),
        ``seconds_a_collection`` (the recorder's), ``seconds_an_update`` (the rest of a training step, everything in)
        and how many ``looks`` they are of.
    """
    pipeline = build(configured(*case))
    watch = _Stopwatch(Recorder(options.every).attach(pipeline))
    reports: Any = iter(pipeline)
    pipeline.observer = watch
    while watch.looks < WARM_UP:  # replay fills, and updates are compiled
        next(reports)
    watch.clear()
    started = time.process_time()
    while watch.looks < options.looks:
        next(reports)
    total = time.process_time() - started
    updates = watch.updates
    usual = statistics.median(seconds for seconds, kind in updates if kind == "other")
    looked, after = ([seconds - usual for seconds, kind in updates if kind == one] for one in ("look", "after"))
    looks = [one + other for one, other in zip(looked, after, strict=False)]  # the last one may be without its next
    rest = (total - sum(looks) - sum(watch.collections)) / len(updates)
    steady = sum(watch.collections) / len(updates)
    lower, median, upper = ((each / options.every + steady) / rest for each in statistics.quantiles(looks, n=4))
    return {
        **dict(zip(("algo", "env", "precision", "compile"), case, strict=True)),
        "every": options.every,
        "looks": len(looks),
        "cost": {"median": median, "lower quartile": lower, "upper quartile": upper},
        "seconds_a_look": statistics.median(looks),
        "seconds_a_collection": statistics.fmean(watch.collections),
        "seconds_an_update": rest,
    }


class _Stopwatch:
    """Stands between a pipeline and its recorder, and times both kinds of call."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.clear()

    def clear(self) -> None:
        """Forget all times."""
        self.updates: list[tuple[float, str]] = []
        self.collections: list[float] = []

    @property
    def looks(self) -> int:
        """How many updates were looked at, the next one of each included."""
        return sum(kind == "after" for _, kind in self.updates)

    def collected(self, rollout: TensorDictBase) -> None:
        """Called by the pipeline."""
        started = time.process_time()
        self.recorder.collected(rollout)
        self.collections.append(time.process_time() - started)

    def update(self, step: Any, batch: TensorDictBase) -> TensorDict:
        """Called by the pipeline."""
        after = bool(self.updates) and self.updates[-1][1] == "look"
        kind = "look" if self.recorder.due else "after" if after else "other"
        started = time.process_time()
        losses = self.recorder.update(step, batch)
        self.updates.append((time.process_time() - started, kind))
        return losses


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
