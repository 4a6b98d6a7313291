"""Time environment steps with random actions: dynamics alone, collectors, TorchRL's rollout, and numpy environments.

All ways of both tasks take turns. One call of each does the same number of steps: ``--block`` of every environment.
"dynamics" stores nothing and carries on the state alone; its actions are drawn in one piece for each block, within the
time. "fused" is a `FusedCollector` that stores every key, "collector" TorchRL's, "rollout" the environment's own
(which begins with a reset), each with random actions. "numpy" is the vector environment on Gymnasium's interface:
Gymnasium's own CartPole, this package's CustomEnv. Compilation is no part of a time, and is printed apart.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch
import tyro
from dynamics import Dynamics
from layers import device_name, device_of
from peers import allocator
from timing import aligned, attempt, make_room, ratios, take_turns, write_records
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy

from fp8rl_torchrl.data import FusedCollector
from fp8rl_torchrl.envs import make
from fp8rl_torchrl.training.memory import keep_freed_memory
from fp8rl_torchrl.training.run_folder import made_with

TASKS = {"CustomEnv": "fp8rl_torchrl:fp8rl/CustomEnv-v0", "CartPole-v1": "CartPole-v1"}
"""The numpy vector environment of each task, by its Gymnasium id."""
WAYS = ("dynamics", "fused", "collector", "rollout", "numpy")
BASE = "collector"
COMPILED = ("dynamics", "fused")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """CustomEnv, CartPole-v1 or both."""
    ways: tuple[str, ...] = WAYS
    """Some of dynamics, fused, collector, rollout and numpy."""
    num_envs: tuple[int, ...] = (8192,)
    """Numbers of environments."""
    block: int = 8
    """Steps that "dynamics" has as one program, and that every way does of each environment in a call."""
    compile: bool = True
    """Whether "dynamics" and "fused" are compiled; the others never are."""
    repeats: int = 5
    """Turns of each way; their median counts."""
    seconds: float = 0.5
    """About how long a turn lasts."""
    seed: int = 0
    """Of the environments and the actions."""
    device: str = "auto"
    """Where to run: auto is cuda if there is one. A CPU runs one thread; numpy always runs on the CPU."""
    out: str = "benchmarks/results/env_throughput"
    """Records are appended to OUT.jsonl, one a task, way and number of environments."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for given, known, what in ((self.tasks, tuple(TASKS), "task"), (self.ways, WAYS, "way")):
            if unknown := sorted(set(given) - set(known)):
                raise ValueError(f"unknown {what} {', '.join(unknown)}; use some of {', '.join(known)}")
        if not (self.tasks and self.ways and self.num_envs):
            raise ValueError("tasks, ways and num-envs must each name at least one")
        if min((*self.num_envs, self.block, self.repeats)) < 1:
            raise ValueError("num-envs, block and repeats must be >= 1")


def main(argv: list[str]) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0; 1 if something failed while it was timed; 2 for bad input.
    """
    try:
        options = tyro.cli(Options, description=__doc__, args=argv)
        device = device_of(options.device)
        file = Path(options.out).with_suffix(".jsonl")
        make_room(file)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_freed_memory()  # as scripts/train.py does
    environment, records = made_with() | {"allocator": allocator()}, []
    print(f"{device_name(device, environment)}; {options.block} steps of every environment in a call")
    for num_envs in options.num_envs:
        torch.compiler.reset()
        measured = measure(num_envs, device, options)
        config = asdict(options) | {"device": str(device)}
        records += [{"config": config} | each | environment for each in measured]
        write_records(file, records[-len(measured) :])
    print(table(records))
    print(f"\n{len(records)} records appended to {file}")
    failed = {record["failure"] for record in records} - {None}
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def way_of(way: str, task: str, num_envs: int, device: torch.device, options: Options) -> Callable[[], object]:
    """One way to step a task's environments: a call does ``block`` steps of each."""
    if way == "numpy":
        return _numpy(task, num_envs, options)
    env: Any = make(task, num_envs=num_envs, device=device, seed=options.seed)
    frames = num_envs * options.block
    if way == "dynamics":
        return Dynamics(env, options.block, options.compile)
    if way == "fused":
        return _next(iter(FusedCollector(env, None, frames_per_batch=frames, compile=options.compile)))
    if way == "collector":
        collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=frames, total_frames=-1)
        return _next(iter(collector))
    return _rollout(env, options.block)


def _next(batches: Iterator[Any]) -> Callable[[], object]:
    return lambda: next(batches)


def _rollout(env: EnvBase, steps: int) -> Callable[[], object]:
    return lambda: env.rollout(steps, break_when_any_done=False)


def _numpy(task: str, num_envs: int, options: Options) -> Callable[[], object]:
    env = gymnasium.make_vec(TASKS[task], num_envs=num_envs, vectorization_mode="vector_entry_point")
    env.action_space.seed(options.seed)
    env.reset(seed=options.seed)

    def steps() -> None:
        for _ in range(options.block):
            env.step(env.action_space.sample())

    return steps


def measure(num_envs: int, device: torch.device, options: Options) -> list[dict[str, Any]]:
    """All ways of all tasks with one number of environments: steps a second, turn by turn.

    Returns:
        A record of each task and way: ``steps_per_second`` (each turn's), ``median``, ``over_collector`` (how many
        times as fast as TorchRL's collector, turn by turn), ``first_call_seconds`` of what is compiled, ``failure``.
    """
    torch.manual_seed(options.seed)
    names = [(task, way) for task in options.tasks for way in options.ways]
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    failures: dict[tuple[str, str], str] = {}
    first: dict[tuple[str, str], float] = {}
    for task, way in names:
        call, why = attempt(lambda task=task, way=way: _built(way, task, num_envs, device, options))
        if call is None:
            failures[task, way] = why or "nothing was built"
        else:
            calls[task, way], first[task, way] = call
    times, failed = take_turns(calls, device, repeats=options.repeats, seconds=options.seconds)
    failures |= failed
    records, frames = [], num_envs * options.block
    for task, way in names:
        taken, base = times.get((task, way)), times.get((task, BASE))
        rates = [frames / each for each in taken] if taken else None
        compiled = options.compile and way in COMPILED
        records.append(
            {
                "task": task,
                "way": way,
                "num_envs": num_envs,
                "steps_per_second": rates,
                "median": statistics.median(rates) if rates else None,
                "over_collector": ratios(base, taken) if base and taken else None,
                "first_call_seconds": first.get((task, way)) if compiled else None,
                "failure": failures.get((task, way)),
            }
        )
    return records


def _built(
    way: str, task: str, num_envs: int, device: torch.device, options: Options
) -> tuple[Callable[[], object], float]:
    """A way, and the seconds of its first call, which compiles."""
    call, started = way_of(way, task, num_envs, device, options), time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return call, time.perf_counter() - started


def table(records: list[dict[str, Any]]) -> str:
    """One row a task, way and number of environments: million steps/s, and the ratio to TorchRL's collector."""

    def row(record: dict[str, Any]) -> tuple[str, ...]:
        head = (record["task"], f"{record['num_envs']:,}", record["way"])
        if record["failure"]:
            return (*head, record["failure"][:40], "", "", "", "")
        rates, over, first = record["steps_per_second"], record["over_collector"], record["first_call_seconds"]
        return (
            *head,
            f"{record['median'] / 1e6:.4g}",
            f"{min(rates) / 1e6:.4g}-{max(rates) / 1e6:.4g}",
            "-" if over is None else f"{over['median']:.2f}",
            "-" if over is None else f"{over['min']:.2f}-{over['max']:.2f}",
            "-" if first is None else f"{first:.1f}",
        )

    header = ("task", "envs", "way", "M steps/s", "range", "× collector", "range", "compiling s")
    return aligned(header, [row(record) for record in records])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
