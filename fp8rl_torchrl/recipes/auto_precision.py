"""``--precision auto``: the precision in which an update of a configuration is fastest on this machine, measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fp8rl_torchrl.precision.capability import float8_capability
from fp8rl_torchrl.precision.convert import ConversionError
from fp8rl_torchrl.precision.mode import has_tf32

REPEATS = 5
TURN_SECONDS = 0.2
"""About how long one turn of one precision lasts."""


@dataclass(frozen=True, kw_only=True)
class AutoPrecision:
    """What was chosen, and what it was chosen from."""

    name: str
    """The precision."""
    seconds: Mapping[str, tuple[float, ...]]
    """For each candidate the seconds of an update, turn by turn."""
    cached: bool
    """Whether it was measured earlier."""

    def __str__(self) -> str:
        """The choice and its figures in a line."""
        figures = ", ".join(f"{name} {median(times) * 1e3:.2f} ms" for name, times in self.seconds.items())
        return f"precision {self.name}: an update takes {figures}{' (measured earlier)' if self.cached else ''}"

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-compatible values."""
        return {"name": self.name, "seconds": {name: list(times) for name, times in self.seconds.items()}}


def candidates(device: str) -> tuple[str, ...]:
    """The precisions that can be faster than another on a device; FP16 is not one, since BF16 has its speed."""
    if torch.device(device).type == "cpu":
        return "fp32", "bf16"
    names = ["tf32" if has_tf32(device) else "fp32", "bf16"]
    if float8_capability(device).backend == "native":
        names.append("fp8")
    return tuple(names)


def fastest(seconds: Mapping[str, tuple[float, ...]]) -> str:
    """The candidate of the smallest median; of two equal ones the first."""
    return min(seconds, key=lambda name: median(seconds[name]))


def choose_precision(
    key: Mapping[str, Any], device: str, make_update: Callable[[str], Callable[[], object]], cache: Path | None = None
) -> AutoPrecision:
    """Measure every candidate, in turns, or take what was measured earlier.

    Args:
        key: All that the speed of an update depends on besides the machine: the measured configuration.
        device: Where updates run.
        make_update: Builds what performs one update in a precision. A candidate for which it raises `ConversionError`
            is left out.
        cache: The file of earlier measurements; None takes ``precision.json`` in ``$FP8RL_TORCHRL_CACHE``, by default
            ``~/.cache/fp8rl_torchrl``.

    Returns:
        The choice with its figures.
    """
    if cache is None:
        folder = os.environ.get("FP8RL_TORCHRL_CACHE", Path.home() / ".cache" / "fp8rl_torchrl")
        cache = Path(folder) / "precision.json"
    known = _read(cache)
    name = _fingerprint(key, device)
    if name in known:
        seconds = {each: tuple(times) for each, times in known[name]["seconds"].items()}
        return AutoPrecision(name=fastest(seconds), seconds=seconds, cached=True)
    updates = {}
    for each in candidates(device):
        with contextlib.suppress(ConversionError):  # no layer of this network can be FP8
            updates[each] = make_update(each)
    seconds = measure(updates, device)
    record = {"key": dict(key), "seconds": {each: list(times) for each, times in seconds.items()}}
    _write(cache, {**known, name: record})
    return AutoPrecision(name=fastest(seconds), seconds=seconds, cached=False)


def measure(updates: Mapping[str, Callable[[], object]], device: str) -> dict[str, tuple[float, ...]]:
    """Seconds of each update, in turns, so that a drift of the machine's speed meets all of them alike."""
    turns: dict[str, list[float]] = {name: [] for name in updates}
    calls: dict[str, int] = {}
    for name, update in updates.items():
        for _ in range(3):  # the first checks, the second compiles
            once = _clock(update, 1, device)
        calls[name] = max(1, min(1000, int(TURN_SECONDS / max(once, 1e-6))))
    for _ in range(REPEATS):
        for name, update in updates.items():
            turns[name].append(_clock(update, calls[name], device))
    return {name: tuple(times) for name, times in turns.items()}


def _clock(update: Callable[[], object], calls: int, device: str) -> float:
    on_gpu = torch.device(device).type == "cuda"
    # On a shared core, time spent waiting for others does not count. But the processor's clock does not see what a GPU
    # does, and adds up what several threads do at once.
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for _ in range(calls):
        update()
    if on_gpu:
        torch.cuda.synchronize(device)
    return (clock() - started) / calls


def _fingerprint(key: Mapping[str, Any], device: str) -> str:
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    machine = (platform.node(), platform.processor(), platform.machine(), gpu, torch.__version__)
    return hashlib.sha256(json.dumps([machine, dict(key)], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads(cache.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{cache} cannot be read ({error}), so precisions are measured anew", stacklevel=2)
        return {}
    return known if isinstance(known, dict) else {}


def _write(cache: Path, known: Mapping[str, Any]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(known, indent=1))
        aside.replace(cache)
    except OSError as error:
        warnings.warn(f"{cache} cannot be written ({error}), so precisions are measured again next time", stacklevel=2)
