"""The least time a linear layer's forward and backward can take: products at the hardware's peak, and its casts.

An estimate counts each product as the longer of its arithmetic and its memory traffic, and adds the traffic of the
casts. It leaves out launches, biases, transposing copies, and everything a cache saves.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from fp8rl_torchrl.precision.capability import float8_capability
from fp8rl_torchrl.precision.recipe import Cast, Float8Recipe

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp8": 1}
"""Bytes of an operand."""


@dataclass(frozen=True)
class Peaks:
    """What a device can do at most.

    Args:
        flops: FLOP/s of matrix products by format (``fp32``, ``tf32``, ``bf16``, ``fp8``), those that it has.
        bandwidth: Memory traffic, bytes/s, read and written.
        source: ``datasheet`` or ``measured``.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str


# Dense rates of the SXM modules, from NVIDIA's datasheets of the two.
_HOPPER = {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.5e12, "fp8": 1979e12}
DATASHEETS = {
    "NVIDIA H100 80GB HBM3": Peaks(_HOPPER, 3.35e12, "datasheet"),
    "NVIDIA H200": Peaks(_HOPPER, 4.8e12, "datasheet"),
}
"""Peaks by the name that the device gives itself."""


def peaks_of(device: torch.device) -> Peaks:
    """The datasheet's peaks where the hardware is known, else measured ones."""
    known = DATASHEETS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or measured_peaks(device)


def measured_peaks(device: torch.device) -> Peaks:
    """Peaks as one large product of each format, and one large copy, show them: best of five, after a warm-up."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    flops = {"fp32": 2 * size**3 / _best(device, lambda: left @ right)}
    halves = left.bfloat16(), right.bfloat16()
    flops["bf16"] = 2 * size**3 / _best(device, lambda: halves[0] @ halves[1])
    if on_gpu:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        flops["tf32"] = 2 * size**3 / _best(device, lambda: left @ right)
        torch.backends.cuda.matmul.allow_tf32 = before
    if on_gpu and float8_capability(device).backend == "native":
        codes = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        flops["fp8"] = (
            2
            * size**3
            / _best(
                device,
                lambda: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
                    *codes, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
                ),
            )
        )
    source = torch.ones(2**30 if on_gpu else 2**25, device=device)
    target = torch.empty_like(source)
    return Peaks(flops, 2 * source.nbytes / _best(device, lambda: target.copy_(source)), "measured")


def _best(device: torch.device, action) -> float:
    best = math.inf
    for turn in range(6):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            torch.cuda.synchronize(device)
            seconds = start.elapsed_time(end) / 1000
        else:
            started = time.process_time()
            action()
            seconds = time.process_time() - started
        best = min(best, seconds if turn else math.inf)
    return best


def flops(width: int, batch: int) -> int:
    """Floating-point operations of the three products: 2 · batch · width² each."""
    return 6 * batch * width**2


def cast_bytes(format: str, recipe: Float8Recipe | None, width: int, batch: int) -> int:
    """The least memory traffic of the casts, in bytes, for FP32 masters and BF16 activations (FP32 in fp32, tf32).

    A cast reads its source once (twice under one scale a tensor: the scale must be known before the first code), and
    writes its codes once. A BF16 product of the weight adds the weight's cast, and that of its gradient back to FP32.
    """
    weight, activation = width**2, batch * width
    if recipe is None:
        return 0 if format in ("fp32", "tf32") else 2 * 6 * weight

    def cast(how: Cast, elements: int, source: int) -> int:
        return elements * (source * (2 if how.scaling == "tensor" else 1) + 1)

    total = cast(recipe.output.left, activation, 2) + cast(recipe.output.right, weight, 4)
    total += cast(recipe.grad_input.left, activation, 2) + cast(recipe.grad_input.right, weight, 4)
    if recipe.grad_weight is None:
        return total + 6 * weight
    for again, before in (
        (recipe.grad_weight.right, recipe.output.left),
        (recipe.grad_weight.left, recipe.grad_input.left),
    ):
        # One scale for all: the codes are read the other way round. Scales a row are others, along the other dimension.
        total += 0 if again == before and again.scaling == "tensor" else cast(again, activation, 2)
    return total


def least_seconds(format: str, recipe: Float8Recipe | None, width: int, batch: int, peaks: Peaks) -> float | None:
    """The estimate for one layer ``width → width``, forward and backward.

    Args:
        format: ``fp32``, ``tf32``, ``bf16``, or ``fp8`` with a recipe.
        recipe: The FP8 recipe, else None.
        width: Inputs and outputs of the layer.
        batch: Rows.
        peaks: Of the hardware.

    Returns:
        Seconds; None where the hardware has no such products.
    """
    in_output = {"fp32": 4, "tf32": 4}.get(format, 2)
    products = [(format, in_output), (format, in_output), (format, 4 if format == "fp8" else in_output)]
    if recipe is not None and recipe.grad_weight is None:
        products[2] = ("bf16", 2)
    if any(product not in peaks.flops for product, _ in products):
        return None
    weight, activation = width**2, batch * width
    sizes = [(activation, weight, activation), (activation, weight, activation), (activation, activation, weight)]
    seconds = cast_bytes(format, recipe, width, batch) / peaks.bandwidth
    for (product, written), (left, right, result) in zip(products, sizes, strict=True):
        traffic = BYTES[product] * (left + right) + written * result
        seconds += max(2 * batch * weight / peaks.flops[product], traffic / peaks.bandwidth)
    return seconds
