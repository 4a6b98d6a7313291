"""Time the sampling of a replay buffer: TorchRL's ``TensorDictReplayBuffer`` against packed rows.

A batch holds what the actor-critic's loss reads of CustomEnv's transitions. The stock buffer's ``sample``, the packed
one's ``sample``, and its ``sample_many`` divided by the number of batches take turns, over buffer sizes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from layers import device_name, device_of
from tensordict import TensorDictBase
from timing import aligned, make_room, ratios, take_turns, write_records
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from fp8rl_torchrl import ActorCritic, envs
from fp8rl_torchrl.data import PackedReplayBuffer, PackedStorage
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss
from fp8rl_torchrl.training.run_folder import made_with

TARGETS = {"sample": 30e-6, "sample_many": 15e-6}
"""Seconds a batch of 64, on one core."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Transitions in the buffer, which is full."""
    batch_size: int = 64
    """Transitions in a batch."""
    count: int = 32
    """Batches that sample_many draws together."""
    repeats: int = 9
    """Turns of each way; their median counts."""
    seconds: float = 0.05
    """About how long a turn lasts."""
    seed: int = 0
    """Of the transitions and the draws."""
    device: str = "auto"
    """Where the buffers are: auto is cuda if there is one. A CPU runs one thread."""
    out: str = "benchmarks/results/replay"
    """Records are appended to OUT.jsonl, one a buffer size."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if min((*self.sizes, self.batch_size, self.count, self.repeats)) < 1:
            raise ValueError("sizes, batch-size, count and repeats must be >= 1")


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
    environment, records = made_with(), []
    print(f"{device_name(device, environment)}; batches of {options.batch_size}")
    for size in options.sizes:
        measured = measure(size, device, options)
        records.append({"config": asdict(options) | {"device": str(device)}} | measured | environment)
        write_records(file, records[-1:])
    print(table(records))
    print(f"\n{len(records)} records appended to {file}")
    failed = {failure for record in records for failure in record["failures"].values()}
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def transitions(size: int, seed: int) -> TensorDictBase:
    """What the actor-critic's loss reads of ``size`` transitions of CustomEnv; beyond 4,096 they repeat."""
    torch.manual_seed(seed)
    env = envs.CustomEnv(num_envs=64, seed=seed)
    agent = ActorCritic.for_env(env)
    rollout = env.rollout(64, agent.policy, break_when_any_done=False).detach()
    kept = rollout.select(*ReplayedActorCriticLoss(agent).in_keys).reshape(-1)
    return kept[torch.arange(size) % len(kept)]


def ways(size: int, device: torch.device, options: Options) -> dict[str, Callable[[], object]]:
    """The three ways to draw, each from a full buffer of its own with the same transitions."""
    data = transitions(size, options.seed).to(device)
    stock = TensorDictReplayBuffer(storage=LazyTensorStorage(size, device=device), batch_size=options.batch_size)
    packed = PackedReplayBuffer(storage=PackedStorage(size, device=device), batch_size=options.batch_size)
    stock.extend(data.clone())
    packed.extend(data)
    return {"stock": stock.sample, "sample": packed.sample, "sample_many": lambda: packed.sample_many(options.count)}


def measure(size: int, device: torch.device, options: Options) -> dict[str, Any]:
    """Seconds a batch of each way, turn by turn, and how many times as fast as the stock buffer each is."""
    times, failures = take_turns(ways(size, device, options), device, repeats=options.repeats, seconds=options.seconds)
    batches = {"stock": 1, "sample": 1, "sample_many": options.count}
    seconds = {name: [time / batches[name] for time in taken] for name, taken in times.items()}
    speedups = {name: ratios(seconds["stock"], seconds[name]) for name in TARGETS if {"stock", name} <= set(seconds)}
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {"size": size, "seconds": seconds, "seconds_median": medians, "speedup": speedups, "failures": failures}


def table(records: list[dict[str, Any]]) -> str:
    """One row a buffer size: µs a batch, and the speed-up over the stock buffer with its range over turns."""

    def row(record: dict[str, Any]) -> tuple[str, ...]:
        medians, speedups = record["seconds_median"], record["speedup"]
        micros = [f"{1e6 * medians[name]:.1f}" if name in medians else "-" for name in ("stock", *TARGETS)]
        times = [
            f"{s['median']:.2f} ({s['min']:.2f}-{s['max']:.2f})" if (s := speedups.get(name)) else "-"
            for name in TARGETS
        ]
        return (f"{record['size']:,}", *micros, *times)

    header = ("size", "stock µs", "sample µs", "sample_many µs", "× sample (range)", "× sample_many (range)")
    return aligned(header, [row(record) for record in records])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
