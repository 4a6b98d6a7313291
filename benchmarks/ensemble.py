"""Time an ensemble of linear layers under ``torch.vmap`` against the same layers one after the other.

Forward and backward, each member with an input of its own, as the hidden layers of an ensemble of critics. Both take
turns on the same data. Inputs, outputs and gradients are BF16 under autocast, FP32 in fp32.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from layers import Layer, device_name, device_of
from timing import aligned, attempt, make_room, ratios, take_turns, write_records
from torch.func import functional_call, stack_module_state
from tqdm import tqdm

from fp8rl_torchrl import Precision
from fp8rl_torchrl.precision.capability import float8_capability
from fp8rl_torchrl.training.run_folder import made_with

NARROW = 256
"""The width up to which an ensemble should take at most `TARGETS`'s first ratio; its second elsewhere."""
TARGETS = (0.7, 1.05)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the results go."""

    sizes: tuple[int, ...] = (2, 5, 10)
    """Members of the ensemble."""
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Inputs and outputs of each layer."""
    batches: tuple[int, ...] = (64, 256)
    """Rows for each member."""
    modes: tuple[str, ...] = ("fp32", "bf16", "fp8-rowwise", "fp8-tensorwise", "fp8-rowwise-gw-hp")
    """Precisions."""
    repeats: int = 9
    """Turns of each; the median of their ratios counts."""
    seconds: float = 0.02
    """About how long a turn lasts."""
    seed: int = 0
    """Of the parameters and the data."""
    device: str = "auto"
    """Where to run: auto is cuda if there is one. A CPU runs one thread."""
    minutes: float | None = None
    """Begin no width and batch after this time."""
    out: str = "benchmarks/results/ensemble"
    """Results go to OUT.jsonl (a record a cell) and OUT.png."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for mode in self.modes:
            Precision(mode)
        if min((*self.sizes, *self.widths, *self.batches, self.repeats)) < 1:
            raise ValueError("sizes, widths, batches and repeats must be >= 1")


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
    environment, runs = made_with(), float8_capability(device)
    print(f"{device_name(device, environment)}: FP8 {runs.backend}, ensembles: {runs.ensembles}")
    started, records = time.monotonic(), []
    points = [(width, batch) for width in options.widths for batch in options.batches]
    for place, (width, batch) in enumerate(tqdm(points, unit=" shapes", dynamic_ncols=True)):
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            left = ", ".join(f"{width}×{batch}" for width, batch in points[place:])
            print(f"out of time after {options.minutes:g} minutes; width × batch not measured: {left}")
            break
        for mode in options.modes:
            for size in options.sizes:
                cell = measure(mode, size, width, batch, device, options)
                ensembles = runs.ensembles if Precision(mode).fp8_recipe else "batched products"
                cell |= {"config": asdict(options) | {"device": str(device)}, "ensembles": ensembles} | environment
                records.append(cell)
                write_records(file, [cell])
    print(table(records))
    plot(records, out.with_suffix(".png"))
    print(f"\n{len(records)} records in {file}, picture {out.with_suffix('.png')}")
    failures = {cell["failure"] for cell in records} - {None, "out of memory"}
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def both_ways(layers: list[Layer]) -> tuple[Callable[[], list[torch.Tensor]], Callable[[], list[torch.Tensor]]]:
    """Forward and backward of several layers: one after the other, and as an ensemble under ``vmap``.

    Returns:
        Two functions that return the same: outputs, gradients of the inputs, of the weights and of the biases, each
        stacked over the members (in ``separate``, lists of the members' tensors, flattened).
    """
    precision, device, first = layers[0].precision, layers[0].device, layers[0].module
    parameters, _ = stack_module_state([layer.module for layer in layers])
    inputs = torch.stack([layer.input.detach() for layer in layers]).requires_grad_()
    grads = torch.stack([layer.grad for layer in layers])
    of_all = torch.vmap(lambda parameters, input: functional_call(first, parameters, (input,)))

    def separate() -> list[torch.Tensor]:
        results: list[torch.Tensor] = []
        for layer in layers:
            with precision.autocast(device):
                output = layer.module(layer.input)
            results += [output, *torch.autograd.grad(output, (layer.input, *layer.module.parameters()), layer.grad)]
        return results

    def ensemble() -> list[torch.Tensor]:
        with precision.autocast(device):
            output = of_all(parameters, inputs)
        return [output, *torch.autograd.grad(output, (inputs, *parameters.values()), grads)]

    return separate, ensemble


def measure(mode: str, size: int, width: int, batch: int, device: torch.device, options: Options) -> dict[str, Any]:
    """One cell: seconds of each turn, both ways, and their ratio (below 1: the ensemble is faster)."""

    def build() -> dict[str, Callable[[], object]]:
        seeds = range(options.seed, options.seed + size)
        ways = both_ways([Layer(mode, width, batch, device, seed) for seed in seeds])
        return dict(zip(("separate", "ensemble"), ways, strict=True))

    steps, failure = attempt(build)
    times, failures = take_turns(steps or {}, device, repeats=options.repeats, seconds=options.seconds)
    failure = failure or next(iter(failures.values()), None)
    target = None  # high precision is measured for comparison alone
    if Precision(mode).fp8_recipe is not None:
        target = TARGETS[0] if width <= NARROW else TARGETS[1]
    ratio = ratios(times["ensemble"], times["separate"]) if failure is None else None
    return {
        "mode": mode,
        "size": size,
        "width": width,
        "batch": batch,
        "failure": failure,
        "seconds": times,
        "ratio": ratio,
        "target": target,
        "met": ratio["median"] <= target if ratio and target else None,
    }


def table(records: list[dict[str, Any]]) -> str:
    """One row a cell: the ensemble's time in units of the separate layers', the median and the range over turns."""

    def row(r: dict[str, Any]) -> tuple[str, ...]:
        first = (str(r["width"]), str(r["batch"]), r["mode"], str(r["size"]))
        if r["ratio"] is None:
            return (*first, r["failure"][:40], *[""] * 5)
        separate, ensemble = (1e3 * statistics.median(r["seconds"][way]) for way in ("separate", "ensemble"))
        spread = f"{r['ratio']['min']:.2f}-{r['ratio']['max']:.2f}"
        said = {True: "met", False: "missed", None: ""}[r["met"]]
        return (
            *first,
            f"{separate:.3f}",
            f"{ensemble:.3f}",
            f"{r['ratio']['median']:.2f}",
            spread,
            f"{r['target']:.2f}" if r["target"] else "-",
            said,
        )

    header = ("width", "batch", "mode", "members", "separate ms", "vmap ms", "ratio", "range", "target", "")
    cells = aligned(header, [row(r) for r in records])
    said = [r["met"] for r in records if r["met"] is not None]
    return f"{cells}\ntarget met in {sum(said)} of {len(said)} FP8 cells"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """The ratio over the width, a line for each size of the ensemble, a panel for each precision and batch."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    shown = [r for r in records if r["ratio"]]
    if not shown:
        return
    modes, batches, sizes, widths = (
        list(dict.fromkeys(r["mode"] for r in shown)),
        *(sorted({r[name] for r in shown}) for name in ("batch", "size", "width")),
    )
    size = (2 + 2.4 * len(modes), 1.2 + 2.7 * len(batches))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(batches), len(modes), sharex=True, sharey=True, squeeze=False)
    colors = [colormaps["viridis"](place / max(1, len(sizes) - 1) * 0.85) for place in range(len(sizes))]
    for (across, batch), (down, mode) in ((b, m) for b in enumerate(batches) for m in enumerate(modes)):
        axes = grid[across][down]
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="as fast as separate layers")
        steps = [width for width in widths if width <= NARROW], [width for width in widths if width > NARROW]
        for part, target in zip(steps, TARGETS, strict=True):
            if part and Precision(mode).fp8_recipe is not None:
                ends = (part[0] / 1.2, part[-1] * 1.2)
                axes.plot(ends, (target, target), color="tab:red", linestyle=":", linewidth=1.5, label="target")
        for color, members in zip(colors, sizes, strict=True):
            line = [r for r in shown if (r["mode"], r["batch"], r["size"]) == (mode, batch, members)]
            ratio = {name: [r["ratio"][name] for r in line] for name in ("median", "min", "max")}
            spread = [
                [m - low for m, low in zip(ratio["median"], ratio["min"], strict=True)],
                [high - m for m, high in zip(ratio["median"], ratio["max"], strict=True)],
            ]
            where = [r["width"] for r in line]
            axes.errorbar(where, ratio["median"], spread, color=color, marker="o", markersize=3, linewidth=1.2,
                          elinewidth=0.7, label=f"{members} members")  # fmt: skip
        axes.set_title(f"{mode}, batch {batch}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(widths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel("width of each layer (inputs = outputs)", fontsize=9)
    figure.supylabel("time of the ensemble / of separate layers (below 1: faster)", fontsize=9)
    legend = dict(zip(*reversed(grid[0][-1].get_legend_handles_labels()), strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=8)
    config, capability = records[0]["config"], next((r["ensembles"] for r in shown if r["mode"][:3] == "fp8"), "")
    hardware = device_name(torch.device(config["device"]), records[0])
    figure.suptitle(f"Ensembles under vmap, forward and backward, on {hardware} (FP8: {capability})", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
