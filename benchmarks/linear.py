"""Time one linear layer, forward and backward, in every precision, eager and compiled, over widths and batches.

The layer is ``width → width`` with a bias and FP32 parameters, as in a network's middle: its input, output and gradient
are BF16 under autocast (FP8 layers too, around their FP8 products), FP32 in fp32 and tf32. All cells of one width and
batch take turns, so that the ratio to BF16 is not one of two moments. Compiled cells on a GPU are captured in a CUDA
graph and replayed, so that they cost what the device costs; eager cells launch each kernel.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from kernels import names, ran, where_the_time_went
from layers import Layer, device_name, device_of
from roofline import Peaks, flops, least_seconds, measured_peaks, peaks_of
from timing import aligned, attempt, make_room, ratios, take_turns, write_records
from tqdm import tqdm

from fp8rl_torchrl import Precision
from fp8rl_torchrl.precision.mode import has_tf32
from fp8rl_torchrl.precision.recipe import RECIPES
from fp8rl_torchrl.training.run_folder import made_with

TARGET = (4096, 16384)
"""The width and batch that are measured first, and profiled."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    widths: tuple[int, ...] = ()
    """Widths. Default: 256 to 8192 on a GPU, 64 to 1024 on a CPU."""
    batches: tuple[int, ...] = ()
    """Batches. Default: 256 to 65536 on a GPU, 64 to 4096 on a CPU."""
    modes: tuple[str, ...] = ("fp32", "tf32", "bf16", "fp8-rowwise", "fp8-tensorwise", "fp8-rowwise-gw-hp")
    """Precisions; tf32 is left out where the device has none."""
    executions: tuple[str, ...] = ()
    """eager, compiled or both. Default: both on a GPU, eager on a CPU, where compiling takes longer than measuring."""
    repeats: int = 9
    """Turns of each cell; their median counts."""
    seconds: float = 0.02
    """About how long a turn lasts."""
    seed: int = 0
    """Of the parameters and the data."""
    device: str = "auto"
    """Where to run: auto is cuda if there is one. A CPU runs one thread."""
    minutes: float | None = None
    """Begin no width and batch after this time. The most telling ones come first."""
    profile: tuple[int, int] | None = None
    """Width and batch to profile. Default: 4096 16384 on a GPU, none on a CPU."""
    out: str = "benchmarks/results/linear"
    """Results go to OUT.jsonl (a record a cell), OUT.png and OUT_profile.txt."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for mode in self.modes:
            Precision(mode)
        if "bf16" not in self.modes:
            raise ValueError("--modes must name bf16, which the others are compared with")
        if not set(self.executions) <= {"eager", "compiled"}:
            raise ValueError(f"--executions takes eager and compiled; got {' '.join(self.executions)}")
        if min((*self.widths, *self.batches, self.repeats)) < 1:
            raise ValueError("widths, batches and repeats must be >= 1")


def main(argv: list[str]) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0; 1 if a cell failed otherwise than for lack of memory; 2 for bad input.
    """
    try:
        options = tyro.cli(Options, description=__doc__, args=argv)
        device = device_of(options.device)
        out = Path(options.out)
        make_room(out)
        file = out.with_suffix(".jsonl")
        file.write_text("")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    on_gpu = device.type == "cuda"
    modes = [mode for mode in options.modes if mode != "tf32" or has_tf32(device)]
    if len(modes) < len(options.modes):
        print(f"tf32 is left out: {device} has none, and would run fp32")
    executions = options.executions or (("eager", "compiled") if on_gpu else ("eager",))
    points = by_importance(
        options.widths or ((256, 512, 1024, 2048, 4096, 8192) if on_gpu else (64, 128, 256, 512, 1024)),
        options.batches or ((256, 1024, 4096, 16384, 65536) if on_gpu else (64, 256, 1024, 4096)),
    )
    profiled = options.profile or (TARGET if on_gpu else None)
    peaks, environment = peaks_of(device), made_with()
    print(f"{device_name(device, environment)}; peaks ({peaks.source}): {words(peaks)}")
    if peaks.source == "datasheet":
        print(f"measured here: {words(measured_peaks(device))}")
    started, records = time.monotonic(), []
    for place, (width, batch) in enumerate(tqdm(points, unit=" shapes", dynamic_ncols=True)):
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            left = ", ".join(f"{width}×{batch}" for width, batch in points[place:])
            print(f"out of time after {options.minutes:g} minutes; width × batch not measured: {left}")
            break
        text = out.with_name(out.stem + "_profile.txt") if (width, batch) == profiled else None
        if text is not None:
            text.write_text("")
        cells = measure(width, batch, modes, executions, device, options, text)
        estimates(cells, peaks)
        records += [{"config": asdict(options) | {"device": str(device)}} | cell | environment for cell in cells]
        write_records(file, records[-len(cells) :])
    print(table(records))
    plot(records, out.with_suffix(".png"))
    print(f"\n{len(records)} records in {file}, picture {out.with_suffix('.png')}")
    failures = {cell["failure"] for cell in records} - {None, "out of memory"}
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def by_importance(widths: tuple[int, ...], batches: tuple[int, ...]) -> list[tuple[int, int]]:
    """All pairs, the nearest to `TARGET` first: by factors of two of width and batch."""
    pairs = [(width, batch) for width in widths for batch in batches]
    return sorted(pairs, key=lambda pair: sum(abs(math.log2(a / b)) for a, b in zip(pair, TARGET, strict=True)))


def measure(
    width: int,
    batch: int,
    modes: list[str],
    executions: tuple[str, ...],
    device: torch.device,
    options: Options,
    profile_to: Path | None = None,
) -> list[dict[str, Any]]:
    """All cells of one width and batch.

    Args:
        width: Inputs and outputs of the layer.
        batch: Rows.
        modes: Precisions.
        executions: ``eager``, ``compiled``.
        device: Where to run.
        options: Repeats, seconds and seed.
        profile_to: Where to write which kernel took how long, if anywhere.

    Returns:
        For each cell: seconds of each turn, or why it failed; bytes saved for backward; what ran; the ratio to BF16.
    """
    torch.compiler.reset()  # one shape's code must not count towards the limit of another's recompilations
    pool = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for mode in modes:
        plain, failure = attempt(lambda mode=mode: Layer(mode, width, batch, device, options.seed))
        for execution in executions:
            cell: dict[str, Any] = {"mode": mode, "execution": execution, "width": width, "batch": batch}
            cells[mode, execution] = cell
            if plain is not None:
                layer = plain if execution == "eager" else plain.compiled()
                told, failure = attempt(lambda layer=layer: describe(layer, profile_to))
                cell |= told or {}
            if plain is not None and failure is None:
                cell["launch"], steps[mode, execution] = "calls", layer.step
                if execution == "compiled" and pool is not None:
                    replay, why = attempt(lambda layer=layer: layer.captured(pool))
                    cell |= {"launch": "graph"} if replay else {"launch": f"calls; no graph: {why}"}
                    steps[mode, execution] = replay or layer.step
            cell["failure"] = failure
    times, failures = take_turns(steps, device, repeats=options.repeats, seconds=options.seconds)
    for (mode, execution), cell in cells.items():
        cell["failure"] = cell["failure"] or failures.get((mode, execution))
        cell["seconds"] = taken = times.get((mode, execution))
        base = times.get(("bf16", execution))
        cell["seconds_median"] = statistics.median(taken) if taken else None
        cell["tflops"] = flops(width, batch) / statistics.median(taken) / 1e12 if taken else None
        # Above 1: faster than BF16. Turn by turn, so that the spread is that of neighbours in time.
        cell["speedup_over_bf16"] = ratios(base, taken) if taken and base else None
    return list(cells.values())


def describe(layer: Layer, profile_to: Path | None) -> dict[str, Any]:
    """Warm a layer up, and say what it saves and what runs."""
    for _ in range(2):
        layer.step()
    told: dict[str, Any] = {"saved_bytes": layer.saved_bytes(), "products": layer.products(), "kernels": None}
    if layer.device.type == "cuda" or profile_to is not None:
        found = ran(layer.step, layer.device)
        told["kernels"] = names(found) if layer.device.type == "cuda" else None
        if profile_to is not None:
            execution = "eager" if layer.forward is layer.module else "compiled"
            rows, width = layer.input.shape
            with profile_to.open("a") as file:
                file.write(f"{layer.precision.name}, {execution}, width {width}, batch {rows}: ")
                file.write(where_the_time_went(found) + "\n\n")
    return told


def estimates(cells: list[dict[str, Any]], peaks: Peaks) -> None:
    """Add to each cell the least time that the hardware needs, and the ratio to BF16 that this would be.

    Where products are emulated there is no estimate: nothing says how long that takes at least.
    """
    for cell in cells:

        def least(mode: str, cell: dict[str, Any] = cell) -> float | None:
            recipe = Precision(mode).fp8_recipe
            format = mode if recipe is None else "fp8"
            return least_seconds(format, RECIPES.get(recipe or ""), cell["width"], cell["batch"], peaks)

        mine, base = least(cell["mode"]), least("bf16")
        cell["estimate_seconds"] = mine
        cell["estimate_speedup_over_bf16"] = base / mine if base and mine else None
        cell["peaks"] = asdict(peaks)


def words(peaks: Peaks) -> str:
    """The peaks in a line."""
    rates = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in peaks.flops.items())
    return f"{rates}, {peaks.bandwidth / 1e9:.4g} GB/s" + ("" if "fp8" in peaks.flops else "; no FP8 products")


def table(records: list[dict[str, Any]]) -> str:
    """One row a cell. ``× bf16`` is the speed-up over BF16, the median and the range over turns."""

    def number(value: float | None, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(value * factor, form)

    def row(r: dict[str, Any]) -> tuple[str, ...]:
        first = (str(r["width"]), str(r["batch"]), r["execution"], r["mode"])
        if r["failure"]:
            return (*first, r["failure"][:40], *[""] * 7)
        ratio = r["speedup_over_bf16"]
        return (
            *first,
            number(r["seconds_median"], ".3f", 1e3),
            f"{1e3 * min(r['seconds']):.3f}-{1e3 * max(r['seconds']):.3f}",
            number(r["tflops"], ".3g"),
            "-" if ratio is None else f"{ratio['median']:.2f}",
            "-" if ratio is None else f"{ratio['min']:.2f}-{ratio['max']:.2f}",
            number(r["estimate_seconds"], ".3f", 1e3),
            number(r["estimate_speedup_over_bf16"], ".2f"),
            number(r["saved_bytes"], ".2f", 2**-20),
        )

    header = ("width", "batch", "execution", "mode", "ms", "ms: range", "TFLOP/s", "× bf16", "range")
    header += ("least ms", "× bf16", "saved MiB")
    ordered = sorted(records, key=lambda r: (r["width"], r["batch"], r["execution"]))
    return aligned(header, [row(r) for r in ordered])


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """The speed-up over BF16 over the width, a line a batch, a panel for each precision and execution."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    shown = [r for r in records if r["speedup_over_bf16"] and r["mode"] != "bf16"]
    modes, executions, batches, widths = (
        list(dict.fromkeys(r["mode"] for r in shown)),
        list(dict.fromkeys(r["execution"] for r in shown)),
        sorted({r["batch"] for r in shown}),
        sorted({r["width"] for r in shown}),
    )
    if not shown:
        return
    size = (2 + 2.6 * len(modes), 1.2 + 2.9 * len(executions))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(executions), len(modes), sharex=True, sharey=True, squeeze=False)
    colors = [colormaps["viridis"](place / max(1, len(batches) - 1) * 0.9) for place in range(len(batches))]
    for (across, execution), (down, mode) in ((a, d) for a in enumerate(executions) for d in enumerate(modes)):
        axes = grid[across][down]
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="as fast as BF16")
        for color, batch in zip(colors, batches, strict=True):
            line = [r for r in shown if (r["execution"], r["mode"], r["batch"]) == (execution, mode, batch)]
            line.sort(key=lambda r: r["width"])
            middle = [r["speedup_over_bf16"]["median"] for r in line]
            spread = [
                [m - r["speedup_over_bf16"]["min"] for m, r in zip(middle, line, strict=True)],
                [r["speedup_over_bf16"]["max"] - m for m, r in zip(middle, line, strict=True)],
            ]
            axes.errorbar(
                [r["width"] for r in line], middle, spread, color=color, marker="o", markersize=3, linewidth=1.2,
                elinewidth=0.7, label=f"batch {batch}",
            )  # fmt: skip
        emulated = any("emulated" in (r["products"] or {}).values() for r in shown if r["mode"] == mode)
        axes.set_title(f"{mode}{', emulated' if emulated else ''}, {execution}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(widths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel("width of the layer (inputs = outputs)", fontsize=9)
    figure.supylabel("speed-up over BF16 (above 1: faster)", fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    where = device_name(torch.device(records[0]["config"]["device"]), records[0])
    figure.suptitle(f"One linear layer, forward and backward, on {where}", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
