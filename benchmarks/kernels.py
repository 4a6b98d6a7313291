"""Which kernels ran, and where the time went: products, casts, and the rest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import aligned
from torch.profiler import ProfilerActivity, profile

_PRODUCTS = re.compile(r"gemm|cutlass|nvjet|cublas|xmma|::(add|b|badd|_scaled_|_scaled_grouped_)?b?mm\b", re.I)
_CASTS = re.compile(
    r"amax|abs|clamp|clone|reciprocal|where|shift|bitwise|_copy|copy_|_mul|::(mul_?|to|view|div|lt|eq|r?sub)\b", re.I
)


@dataclass(frozen=True)
class Ran:
    """One kernel of a step; on a CPU, one operation.

    Args:
        op: The operation that launched it.
        kernel: Its name.
        calls: How often it ran.
        seconds: How long, all calls together.
    """

    op: str
    kernel: str
    calls: int
    seconds: float

    @property
    def part(self) -> str:
        """``products``, ``casts`` (all that makes, moves or scales codes), or ``rest`` (biases and the like).

        By the names of the operation and the kernel: a compiled kernel that does both counts as casts.
        """
        name = f"{self.op} {self.kernel}"
        return "products" if _PRODUCTS.search(name) else "casts" if _CASTS.search(name) else "rest"


def ran(step: Callable[[], object], device: torch.device) -> list[Ran]:
    """What one call of a step runs, the longest first.

    Args:
        step: It should be warm.
        device: Where it runs. On a CPU, compiled code shows as one operation.
    """
    on_gpu = device.type == "cuda"
    for _ in range(2):  # the first profile of a process pays for setting up
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            step()
            if on_gpu:
                torch.cuda.synchronize(device)
    events = profiler.events() or []
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    if on_gpu:
        ranges = {event.name for event in events if getattr(event, "is_user_annotation", False)}
        for event in events:
            for kernel in event.kernels:  # only what launched some has any
                if kernel.name not in ranges:
                    found[event.name, kernel.name].append(kernel.duration)
    else:
        for event in events:
            found[event.name, event.name].append(event.self_cpu_time_total)
    rows = [Ran(op, kernel, len(times), sum(times) / 1e6) for (op, kernel), times in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def names(rows: list[Ran], longest: int = 100) -> list[str]:
    """The distinct kernels, shortened, the longest-running first."""
    return list(dict.fromkeys(row.kernel[:longest] for row in rows))


def where_the_time_went(rows: list[Ran]) -> str:
    """The share of each part, and a table of the kernels."""
    total = sum(row.seconds for row in rows) or 1.0
    parts = {part: sum(row.seconds for row in rows if row.part == part) for part in ("products", "casts", "rest")}
    shares = ", ".join(f"{part} {seconds * 1e3:.3f} ms ({seconds / total:.0%})" for part, seconds in parts.items())
    table = aligned(
        ("ms", "share", "calls", "part", "operation", "kernel"),
        [
            (f"{r.seconds * 1e3:.3f}", f"{r.seconds / total:.1%}", str(r.calls), r.part, r.op[:50], r.kernel[:120])
            for r in rows
            if r.seconds > 1e-3 * total
        ],
    )
    return f"{total * 1e3:.3f} ms: {shares}\n{table}"
