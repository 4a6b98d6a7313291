"""One whole update of a wide actor-critic (loss, gradients, clipping, Adam) in every precision, side by side.

Compiled and, on a GPU, captured as a CUDA graph. All precisions take turns on the same batch of transitions.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from layers import device_name, device_of
from tensordict import TensorDictBase
from timing import aligned, attempt, make_room, ratios, take_turns, write_records

import fp8rl_torchrl as f8
from fp8rl_torchrl.training.flat import FlatParameter
from fp8rl_torchrl.training.memory import keep_freed_memory
from fp8rl_torchrl.training.run_folder import made_with


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the records go."""

    width: int = 4096
    """Width of every hidden layer."""
    layers: int = 3
    """Hidden layers of the shared encoder."""
    batch: int = 16_384
    """Transitions in a batch."""
    modes: tuple[str, ...] = ("fp32", "tf32", "bf16", "fp8", "fp8-tensorwise", "fp8-rowwise-gw-hp")
    """Precisions."""
    compile: bool = True
    """Whether to compile, and on a GPU to capture."""
    repeats: int = 5
    """Turns of each precision."""
    seconds: float = 1.0
    """About how long a turn lasts."""
    device: str = "auto"
    """Where to run."""
    out: str = "benchmarks/results/wide_update"
    """Records are appended to OUT.jsonl."""


def main(argv: list[str]) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0; 1 if a precision failed; 2 for bad input.
    """
    try:
        options = tyro.cli(Options, description=__doc__, args=argv)
        if min(options.width, options.layers, options.batch, options.repeats) < 1:
            raise ValueError("width, layers, batch and repeats must be >= 1")
        device = device_of(options.device)
        for mode in options.modes:
            f8.Precision(mode)
        file = Path(options.out).with_suffix(".jsonl")
        make_room(file)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_freed_memory()
    environment = made_with()
    print(device_name(device, environment))
    records = measure(options, device)
    write_records(file, [record | environment for record in records])
    print(table(records))
    return 1 if any(record["failure"] for record in records) else 0


def measure(options: Options, device: torch.device) -> list[dict[str, Any]]:
    """Time an update in every precision."""
    torch.manual_seed(0)
    env = f8.envs.CustomEnv(num_envs=options.batch, device=device, seed=0)
    agent = f8.ActorCritic.for_env(env, hidden=(options.width,) * options.layers)
    with torch.no_grad():
        batch = env.rollout(1, agent.policy).reshape(-1)
    updates: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for mode in options.modes:
        update, failure = attempt(lambda mode=mode: _update(agent, batch, mode, options.compile))
        if update is None:
            failures[mode] = str(failure)
        else:
            updates[mode] = update
    times, later = take_turns(updates, device, repeats=options.repeats, seconds=options.seconds)
    return [
        {"mode": mode, "seconds": times.get(mode), "failure": (failures | later).get(mode)}
        | {"config": asdict(options) | {"device": str(device)}}
        for mode in options.modes
    ]


def _update(agent: f8.ActorCritic, batch: TensorDictBase, mode: str, compiled: bool) -> Callable[[], object]:
    agent = copy.deepcopy(agent)
    precision = f8.Precision(mode)
    if precision.fp8_recipe is not None:
        f8.convert(agent, precision)
    loss = f8.objectives.ReplayedActorCriticLoss(agent)
    batch = batch.select(*loss.in_keys)
    step = f8.OptimStep(
        loss,
        torch.optim.Adam([FlatParameter(loss.parameters())], lr=1e-4, fused=True),
        precision,
        max_grad_norm=0.5,
        compile=compiled,
        cudagraph=compiled and batch["action"].is_cuda,
    )
    for _ in range(6):  # checks, compiles, and captures
        step(batch)
    return lambda: step(batch)


def table(records: list[dict[str, Any]]) -> str:
    """Milliseconds of an update by precision, and how much faster each is than the others it is compared with."""
    timed = {record["mode"]: record["seconds"] for record in records if record["seconds"]}
    bases = [name for name in ("fp32", "tf32", "bf16") if name in timed]
    rows = []
    for record in records:
        mode, seconds = record["mode"], record["seconds"]
        if not seconds:
            rows.append((mode, str(record["failure"]), *[""] * len(bases)))
            continue
        speedups = [ratios(timed[base], seconds) for base in bases]
        cells = (f"{s['median']:.2f} ({s['min']:.2f}–{s['max']:.2f})" for s in speedups)
        rows.append((mode, f"{median(seconds) * 1e3:.2f}", *cells))
    return aligned(("precision", "ms", *(f"× {base}" for base in bases)), rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
