"""What ``auto`` stands for in a configuration: how a run collects, and whether it is compiled and captured."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Estimates of one CPU core, in s, of which only the order matters: eager steps and updates of the smallest networks and
# batches, and a first compilation of both. A run has to be well beyond the break-even point.
EAGER_STEP = 1e-3
EAGER_UPDATE = 1e-3
COMPILATION = 45.0


def choose(
    options: Mapping[str, str],
    *,
    native: bool,
    device: str,
    collections: int,
    steps: int,
    updates: int,
) -> tuple[dict[str, str], list[str]]:
    """Decide what each ``auto`` stands for.

    Args:
        options: ``collector`` (auto, torchrl or fused), ``compile`` and ``cudagraph`` (auto, on or off).
        native: Whether the environment can be fused.
        device: Where the run computes.
        collections: About how many collections it has.
        steps: Steps of every environment in each.
        updates: Updates after each.

    Returns:
        The three options, decided, and a sentence for each that was not given.
    """
    chosen, reasons = dict(options), []
    eager = collections * (steps * EAGER_STEP + updates * EAGER_UPDATE)
    length = f"uncompiled, it takes {eager:,.0f} s or more, and compiling alone about {COMPILATION:.0f} s"
    if chosen["compile"] == "auto":
        chosen["compile"] = "on" if eager > 2 * COMPILATION else "off"
        reasons.append(f"compile {chosen['compile']}: {length}")
    if chosen["collector"] == "auto":
        chosen["collector"] = "fused" if native and chosen["compile"] == "on" else "torchrl"
        if not native:
            why = "the environment has no pure functions"
        elif chosen["compile"] == "on":
            why = "a native environment, in a compiled run"
        else:
            why = "the run is not compiled"
        reasons.append(f"collector {chosen['collector']}: {why}")
    if chosen["cudagraph"] == "auto":
        on = torch.device(device).type == "cuda" and chosen["compile"] == "on"
        chosen["cudagraph"] = "on" if on else "off"
        if torch.device(device).type == "cuda":
            reasons.append(f"cudagraph {chosen['cudagraph']}: as compile")
    return chosen, reasons
