"""How the benchmarks measure: steps that take turns, so that a drift of the machine's speed meets all of them alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

FLUSHED_BYTES = 256 * 2**20
"""Written before each timed call on a GPU: more than its L2 cache holds, so that no call finds its operands there."""


def attempt(action: Callable[[], Value]) -> tuple[Value | None, str | None]:
    """Do something that may fail without ending the benchmark.

    Returns:
        What it returned, and None; or None, and why it failed: ``out of memory``, or the error's first line.
    """
    try:
        return action(), None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in lines[0]
        failure = "out of memory" if memory else f"{type(error).__name__}: {lines[0]}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # only here, where the error no longer holds the frames of what failed
    return None, failure


def take_turns(
    steps: Mapping[Key, Callable[[], object]], device: torch.device, *, repeats: int, seconds: float
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Time several steps, in turns.

    On a CPU it is the processor time of this process (one thread: on a shared core, waiting does not count). On a GPU
    it is the time between two events around each call, with the L2 cache flushed before it.

    Args:
        steps: What to time, by name. Each is warmed up first.
        device: Where they run.
        repeats: Turns of each step.
        seconds: About how long one turn lasts; at least one call.

    Returns:
        Seconds a call, for each turn of each step; and why the steps that failed did, which have no times.
    """
    clock = _gpu_clock(device) if device.type == "cuda" else _cpu_clock
    times: dict[Key, list[float]] = {}
    calls: dict[Key, int] = {}
    failures: dict[Key, str] = {}

    def turn(name: Key, count: int) -> float | None:
        taken, failure = attempt(lambda: clock(steps[name], count))
        if failure is not None:
            failures[name] = failure
            times.pop(name, None)
        return taken

    for name in steps:
        turn(name, 1)
        if name not in failures and (once := turn(name, 1)) is not None:
            times[name], calls[name] = [], max(1, min(1000, int(seconds / max(once, 1e-9))))
    for _ in range(repeats):
        for name in [name for name in steps if name in times]:
            if (taken := turn(name, calls[name])) is not None:
                times[name].append(taken)
    return times, failures


def _cpu_clock(step: Callable[[], object], calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - started) / calls


def _gpu_clock(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def clock(step: Callable[[], object], calls: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in pairs:
            flushed.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1000

    return clock


def ratios(times: list[float], base: list[float]) -> dict[str, float]:
    """How long something took in units of something else, turn by turn: median, min and max."""
    each = [mine / other for mine, other in zip(times, base, strict=True)]
    return {"median": median(each), "min": min(each), "max": max(each)}


def make_room(out: Path) -> None:
    """Make the folder that ``--out`` names a file in.

    Raises:
        ValueError: If it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}: {error.filename}") from error


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records to a file, a line of JSON each."""
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def aligned(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table, with its columns aligned to the right."""
    lines = [header, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )
