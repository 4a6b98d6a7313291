"""The parts of a training iteration, each on its own and at the same shapes: where the time of a frame goes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Cell, split
from dynamics import Dynamics, at_the_edge
from tensordict import TensorDict, TensorDictBase
from timing import take_turns
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fp8rl_torchrl.data.fused import BLOCK
from fp8rl_torchrl.recipes import build, config_class
from fp8rl_torchrl.training.loop import Pipeline

FILLED_TOGETHER = 65_536
SAMPLE_EVERY = 1.0
"""Seconds between two looks at the memory."""


def pipeline_of(cell: Cell) -> Pipeline:
    """The recipe at the cell's size, without an end."""
    options: dict[str, Any] = {}
    if cell.algo == "actor-critic":
        options = {"replay_size": cell.replay_size, "min_replay": 1}
    return build(
        config_class(cell.algo)(
            env=cell.env,
            num_envs=cell.num_envs,
            frames_per_collection=cell.frames,
            hidden=(cell.width, cell.width),
            precision=cell.precision,
            collector="fused",
            compile="on" if cell.compile else "off",
            total_frames=10**15,
            device=cell.device,
            seed=cell.seed,
            **options,
        )
    )


def measure(cell: Cell, repeats: int, seconds: float) -> dict[str, Any]:
    """Time a cell's iteration and its parts, in turns.

    "env" is the dynamics with fixed actions, as one program; "policy" the collecting policy on the observations, step
    by step; "replay" storing a collection and drawing the batches; "update" the updates on them; "collect" what the
    collector does as a whole.

    Args:
        cell: What to measure.
        repeats: Turns of each part.
        seconds: About how long a turn lasts.

    Returns:
        ``seconds`` of each turn by part, ``ns_per_frame`` by part (medians), ``frames_per_second`` of the whole,
        ``compile_seconds`` (the first call of everything), and ``memory_start_bytes`` and ``memory_peak_bytes``.

    Raises:
        MemoryError: If a part ran out of memory.
        RuntimeError: If a part failed otherwise.
    """
    start = _memory(cell.device)
    began = time.perf_counter()
    pipeline = pipeline_of(cell)
    parts = parts_of(pipeline, cell)
    for part in parts.values():
        part()
    compile_seconds = time.perf_counter() - began
    times, failures = take_turns(parts, torch.device(cell.device), repeats=repeats, seconds=seconds)
    if failures:
        if "out of memory" in failures.values():
            raise MemoryError
        raise RuntimeError("; ".join(f"{part}: {failure}" for part, failure in failures.items()))
    if "replay" not in times:
        times["replay"] = [0.0] * repeats
    ns = split(times, cell.frames)
    return {
        "seconds": times,
        "ns_per_frame": ns,
        "frames_per_second": 1e9 / ns["total"],
        "compile_seconds": compile_seconds,
        "memory_start_bytes": start,
        "memory_peak_bytes": _memory(cell.device),
    }


def parts_of(pipeline: Pipeline, cell: Cell) -> dict[str, Callable[[], object]]:
    """What an iteration is made of, by name; each call does it for the frames of one collection."""
    config: Any = pipeline.config
    collector: Any = pipeline.collector
    training = iter(pipeline)
    next(training)
    rollout = collector.rollout()
    if pipeline.replay is not None:
        fill(pipeline.replay, rollout.select(*pipeline.loss.in_keys).reshape(-1), cell.replay_size)
    batches = list(pipeline._batches(rollout))
    whole, rest = divmod(cell.steps, BLOCK)
    blocks = [Dynamics(config.make_env(), BLOCK, cell.compile, blocks=whole, fixed=True)] if whole else []
    blocks += [Dynamics(config.make_env(), rest, cell.compile, fixed=True)] if rest else []
    parts: dict[str, Callable[[], object]] = {
        "env": lambda: [block() for block in blocks],
        "policy": _acting(collector.policy, rollout["observation"][..., 0, :], cell),
        "update": lambda: [pipeline.step(batch) for batch in batches],
        "collect": collector.rollout,
        "total": lambda: next(training),
    }
    if pipeline.replay is not None:
        parts["replay"] = lambda: list(pipeline._batches(rollout))
    return parts


def _acting(policy: Any, observation: torch.Tensor, cell: Cell) -> Callable[[], object]:
    observation = observation.contiguous()

    def act(observation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        written = policy(TensorDict({"observation": observation}, batch_size=observation.shape[:-1]))
        return written["action"], written["action_log_prob"]

    program = at_the_edge(act, cell.compile, torch.device(cell.device))

    @torch.no_grad()
    def steps() -> None:
        with set_exploration_type(ExplorationType.RANDOM):  # pyright: ignore[reportArgumentType]
            for _ in range(cell.steps):
                program(observation)

    return steps


def fill(replay: Any, transitions: TensorDictBase, size: int) -> None:
    """Store transitions, again and again, until a buffer holds ``size``."""
    some = transitions[torch.arange(min(size, FILLED_TOGETHER), device=transitions.device) % len(transitions)]
    while len(replay) < size:
        replay.extend(some[: size - len(replay)])


def resident(cell: Cell, minutes: float) -> dict[str, Any]:
    """Train for some minutes, and look at the resident memory about once a second.

    Returns:
        ``samples`` (bytes, in order; the first tenth of the time, the warm-up, is left out), ``frames`` and
        ``train_seconds``.
    """
    pipeline, samples = pipeline_of(cell), list[int]()
    training = iter(pipeline)
    report = next(training)  # compiles
    began = time.monotonic()
    end, due = began + 60 * minutes, began + 6 * minutes
    every = min(SAMPLE_EVERY, 60 * minutes / 100)
    while (now := time.monotonic()) < end or len(samples) < 2:
        report = next(training)
        if now >= due:
            samples.append(resident_bytes())
            due += every
    return {"samples": samples, "frames": report.frames, "train_seconds": report.seconds}


def resident_bytes() -> int:
    """The memory of this process that is in RAM now.

    Raises:
        RuntimeError: Where the system does not say, which Linux does.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError as error:
        raise RuntimeError(f"resident memory is read from /proc, which this system does not have: {error}") from None


def _memory(device: str) -> int:
    """The most memory that this process has used so far: of the GPU where it computes on one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: what getrusage says begins with the size of the one that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
