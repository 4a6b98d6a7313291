"""One cell of a training benchmark: a recipe at one size, measured in a process of its own.

So the peak memory is the cell's own, and one that needs too much takes no other with it. Run as a program, this
measures the cell that its argument describes and prints a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers import take_turn
from timing import attempt

ALGORITHMS = ("a2c", "actor-critic")
PARTS = ("env", "policy", "replay", "update", "rest")
LIMITS = {"out of memory", "out of time"}
"""What a cell may fail of without anything being wrong."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained, and how large it is."""

    algo: str = "a2c"
    env: str = "CustomEnv"
    num_envs: int = 1024
    steps: int = 8
    """Of each environment in a collection."""
    width: int = 64
    """Of both hidden layers."""
    precision: str = "fp32"
    compile: bool = True
    replay_size: int = 0
    """Transitions in the buffer, which is full when time is taken; 0 for a2c, which has none."""
    device: str = "cpu"
    seed: int = 0

    @property
    def frames(self) -> int:
        """Environment steps of one collection, over all environments."""
        return self.num_envs * self.steps

    @property
    def weight(self) -> float:
        """About how much work one collection is: what orders cells by size."""
        return self.frames * (self.width**2 + 1000.0) + self.replay_size

    def at_least(self, other: Cell) -> bool:
        """Whether this is the other one, or larger and otherwise the same."""
        sizes = ("num_envs", "width", "replay_size")
        same = dataclasses.replace(self, **{name: getattr(other, name) for name in sizes}) == other
        return same and all(getattr(self, name) >= getattr(other, name) for name in sizes)


@dataclass(frozen=True, kw_only=True)
class Runner:
    """How cells are run."""

    core: int | None
    """The core that each is pinned to; None does not pin."""
    repeats: int = 5
    """Turns of each part."""
    seconds: float = 0.3
    """About how long a turn lasts."""
    limit: float = 600.0
    """Seconds after which a cell is ended."""
    max_memory_gib: float = 12.0
    """What a cell may allocate on a CPU; beyond it fails as out of memory."""

    def run(self, cell: Cell, flat_minutes: float = 0.0) -> dict[str, Any]:
        """Measure a cell in a process of its own.

        Args:
            cell: What to measure.
            flat_minutes: If positive, train for so long and sample the memory instead of timing the parts.

        Returns:
            What `parts.measure` or `parts.resident` returned, and ``failure``: None, ``out of memory``,
            ``out of time``, or what went wrong.
        """
        job = {"cell": asdict(cell), "repeats": self.repeats, "seconds": self.seconds, "flat_minutes": flat_minutes}
        words = [sys.executable, __file__, json.dumps(job | {"max_memory_gib": self.max_memory_gib})]
        result = take_turn(words, self.core, self.limit + 60 * flat_minutes)
        failure = result.get("failure")
        if failure is not None and failure.startswith("not done after"):
            failure = "out of time"
        elif failure is not None and failure.startswith("ended with code -9"):  # which is how Linux defends its memory
            failure = "out of memory"
        return result | {"failure": failure}


def run_all(cells: Iterable[Cell], runner: Runner, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Measure cells from the smallest to the largest, and none that is larger than one that was too large.

    Args:
        cells: What to measure.
        runner: How.
        seconds_left: How much time there is; below 0 no further cell is begun.

    Yields:
        A record of each cell, with ``cell`` and ``failure``; of one that was not begun, ``failure`` says why.
    """
    too_large: list[Cell] = []
    for cell in sorted(cells, key=lambda each: each.weight):
        if seconds_left() < 0:
            result: dict[str, Any] = {"failure": "not begun: the budget is spent"}
        elif any(cell.at_least(other) for other in too_large):
            result = {"failure": "not begun: a smaller one was too large"}
        else:
            result = runner.run(cell)
            if result["failure"] in LIMITS:
                too_large.append(cell)
        yield {"cell": asdict(cell)} | result


def broken(records: Iterable[dict[str, Any]]) -> set[str]:
    """What went wrong, other than that cells were too large."""
    failures = {record["failure"] for record in records} - {None} - LIMITS
    return {failure for failure in failures if not failure.startswith("not begun")}


def budget(minutes: float | None) -> Callable[[], float]:
    """The seconds that are left of some minutes from now; None never ends."""
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    return lambda: end - time.monotonic()


def split(seconds: dict[str, list[float]], frames: int) -> dict[str, float]:
    """Where a frame's time goes, in ns: the medians of the parts, measured apart, and the rest of the whole.

    The rest is negative where the parts cost more apart than together.

    Args:
        seconds: Of each turn of ``env``, ``policy``, ``replay``, ``update``, ``collect`` and ``total``, each for the
            frames of one collection.
        frames: Frames of one collection.
    """
    each = {name: 1e9 * statistics.median(taken) / frames for name, taken in seconds.items()}
    each["rest"] = each["total"] - sum(each[name] for name in PARTS[:-1])
    return each


def limit_memory(gib: float) -> None:
    """Let this process allocate no more than this, so that it fails before the machine does."""
    size = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def main(argv: list[str]) -> int:
    """Measure the cell that the argument describes, and print the result."""
    job = json.loads(argv[0])
    cell = Cell(**job["cell"])
    torch.set_num_threads(1)
    if cell.device == "cpu":
        limit_memory(job["max_memory_gib"])
    from parts import measure, resident

    if job["flat_minutes"]:
        result, failure = attempt(lambda: resident(cell, job["flat_minutes"]))
    else:
        result, failure = attempt(lambda: measure(cell, job["repeats"], job["seconds"]))
    if failure is not None and failure.startswith("MemoryError"):
        failure = "out of memory"
    print(json.dumps((result or {}) | {"failure": failure}))
    return 0


def read_records(path: Path) -> dict[Cell, dict[str, Any]]:
    """The newest record of each cell that was measured, of a file that may not exist."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {Cell(**record["cell"]): record for record in records if "cell" in record and record["failure"] is None}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
