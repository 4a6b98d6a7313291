"""The least time of a layer, worked out by hand."""

import pytest
import torch
from roofline import DATASHEETS, Peaks, cast_bytes, flops, least_seconds, measured_peaks

from fp8rl_torchrl.precision.recipe import RECIPES

W, B = 4, 8
ARITHMETIC = Peaks({"fp32": 1.0, "bf16": 2.0, "fp8": 4.0}, 1e30, "by hand")
MEMORY = Peaks({"fp32": 1e30, "bf16": 1e30, "fp8": 1e30}, 1.0, "by hand")


def test_flops():
    assert flops(W, B) == 3 * 2 * 8 * 4 * 4 == 768


@pytest.mark.parametrize(
    ("format", "recipe", "seconds"),
    [
        ("fp32", None, 768 / 1),
        ("bf16", None, 768 / 2),
        ("fp8", "rowwise", 768 / 4),
        ("fp8", "tensorwise", 768 / 4),
        ("fp8", "rowwise-gw-hp", 512 / 4 + 256 / 2),  # grad_weight in BF16
    ],
)
def test_with_infinite_bandwidth_arithmetic_counts(format, recipe, seconds):
    assert least_seconds(format, RECIPES.get(recipe), W, B, ARITHMETIC) == pytest.approx(seconds)


# Activations have 32 elements, the weight 16. Products read two operands and write one.
BF16_TRAFFIC = 2 * (32 + 16 + 32) * 2 + 2 * (32 + 32 + 16)


@pytest.mark.parametrize(
    ("format", "recipe", "casts", "products"),
    [
        ("fp32", None, 0, 2 * BF16_TRAFFIC),
        # the weight 4 → 2 bytes, its gradient 2 → 4
        ("bf16", None, 16 * 6 + 16 * 6, BF16_TRAFFIC),
        # input and gradient 2 → 1, each twice; the weight 4 → 1, twice; BF16 out, and FP32 for grad_weight
        ("fp8", "rowwise", 4 * 32 * 3 + 2 * 16 * 5, 2 * (32 + 16 + 2 * 32) + 32 + 32 + 4 * 16),
        # input and gradient once each, read twice; the weight twice, read twice
        ("fp8", "tensorwise", 2 * 32 * 5 + 2 * 16 * 9, 2 * (32 + 16 + 2 * 32) + 32 + 32 + 4 * 16),
        # input and gradient once each; the weight a row and a tensor; grad_weight in BF16, then to FP32
        ("fp8", "rowwise-gw-hp", 2 * 32 * 3 + 16 * 5 + 16 * 9 + 16 * 6, 2 * (32 + 16 + 2 * 32) + 2 * (32 + 32 + 16)),
    ],
)
def test_with_infinite_arithmetic_traffic_counts(format, recipe, casts, products):
    assert cast_bytes(format, RECIPES.get(recipe), W, B) == casts
    assert least_seconds(format, RECIPES.get(recipe), W, B, MEMORY) == pytest.approx(casts + products)


def test_where_there_are_no_such_products_there_is_no_estimate():
    cpu = Peaks({"fp32": 1.0, "bf16": 2.0}, 1.0, "by hand")
    assert least_seconds("fp8", RECIPES["rowwise"], W, B, cpu) is None
    assert least_seconds("tf32", None, W, B, cpu) is None
    assert least_seconds("bf16", None, W, B, cpu) is not None


def test_what_hopper_promises():
    h200 = DATASHEETS["NVIDIA H200"]

    def speedup(width, batch):
        fp8 = least_seconds("fp8", RECIPES["rowwise"], width, batch, h200)
        return least_seconds("bf16", None, width, batch, h200) / fp8

    assert 1.5 < speedup(4096, 16384) < 1.75
    assert speedup(512, 16384) < 1 < speedup(2048, 16384)


def test_measured_peaks_of_a_cpu():
    peaks = measured_peaks(torch.device("cpu"))
    assert set(peaks.flops) == {"fp32", "bf16"}
    assert peaks.source == "measured"
    assert all(1e8 < rate < 1e14 for rate in (*peaks.flops.values(), peaks.bandwidth))
