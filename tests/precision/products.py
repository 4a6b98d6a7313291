"""What the tests of FP8 numbers and products share: deterministic operands, exact products, errors and bounds."""

from __future__ import annotations

import itertools

import pytest
import torch

from fp8rl_torchrl.precision.capability import float8_capability
from fp8rl_torchrl.precision.quantize import dequantize, quantize
from fp8rl_torchrl.precision.recipe import Cast

FORMATS = ("e4m3", "e5m2")
PAIRS = tuple(itertools.product(FORMATS, FORMATS))
"""The formats of the two operands of a product, in every combination."""

CASTS = tuple(Cast(*each) for each in itertools.product(FORMATS, ("row", "tensor"), (True, False)))
"""Every way to cast."""

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
"""One test on both: each that needs a GPU has its counterpart on the CPU."""

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of rounding once to a dtype."""


def name_of(cast):
    return f"{cast}/{'2^n' if cast.power_of_two else 'any'}"


def normal(*shape, seed=0, device="cpu"):
    """The same standard normal numbers on every device, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def operands(left_shape, right_shape, left="e4m3", right="e4m3", scaling="row", seed=0, device="cpu"):
    """Codes and scales of two random operands, ``left [..., M, K]`` and ``right [..., N, K]``.

    The scales are not powers of two under ``tensor``, as in the recipes. Rows differ in size, so that mixed up scales
    show.
    """
    quantized = []
    for format, shape, offset in ((left, left_shape, 0), (right, right_shape, 1)):
        x = normal(*shape, seed=2 * seed + offset, device=device)
        x = x * 4.0 ** (torch.arange(shape[-2], device=device) % 3)[:, None]
        quantized += quantize(x, Cast(format, scaling, power_of_two=scaling == "row"))
    return quantized


def exact_product(left, left_scale, right, right_scale):
    """The product of codes and scales in float64, on the CPU. The decoding is PyTorch's own."""
    left, right = (
        dequantize(*each).double()
        for each in ((left.cpu(), left_scale.cpu().double()), (right.cpu(), right_scale.cpu().double()))
    )
    return left @ right.mT


def relative_error(actual, expected):
    """In the Frobenius norm, computed in float64 on the CPU."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def native_bound(size, out_dtype, fast_accum):
    """How far, in relative Frobenius norm, a native product may be from the exact one.

    Tensor cores add 32 products at a time to an accumulator. They align all terms to the largest, keep 13 bits below
    its leading one, and drop the rest: each addend loses at most 2^-13 of the largest term. After K products of
    independent signs the accumulator has grown to √K of one product, and each of the K dropped parts, no longer small
    beside a product, shrinks the sum in proportion: √K · 2^-13. `tensor_core_product` computes this to the bit, and
    stays under a fifth of that. Without fast accumulation the accumulator starts anew every 128 products, and their
    sums are added in FP32. The result is rounded once, to its dtype; 1e-6 is left for scales and sums in FP32.
    """
    return 2.0**-13 * (size if fast_accum else min(size, 128)) ** 0.5 + UNIT_ROUNDOFF[out_dtype] + 1e-6


def tensor_core_product(left, right, fast_accum):
    """Multiply decoded codes as the tensor cores' accumulator does, in float64: ``[M, K]``, ``[N, K]`` → ``[M, N]``."""
    products = (left[:, None] * right).unflatten(-1, (-1, 32))
    total = accumulator = torch.zeros_like(products[..., 0, 0])
    for step in range(products.shape[-2]):
        terms = torch.cat([products[..., step, :], accumulator[..., None]], -1)
        exponent = terms.abs().amax(-1, keepdim=True).frexp().exponent
        kept = 2.0 ** (exponent - 1 - 13).double()
        accumulator = ((terms / kept).trunc() * kept).sum(-1)
        if not fast_accum and step % 4 == 3:
            total, accumulator = total + accumulator, torch.zeros_like(accumulator)
    return total + accumulator


def need_native(device, rowwise_bf16=False):
    """Skip where the backend ``native`` does not exist, and say why."""
    if device == "cuda" and float8_capability("cuda").backend != "native":
        pytest.skip(f"no FP8 hardware: {float8_capability('cuda').reason}")
    if device == "cpu" and rowwise_bf16 and not _cpu_has_rowwise():
        pytest.skip(f"PyTorch {torch.__version__} has no rowwise reference kernel on the CPU (2.13 has)")


def _cpu_has_rowwise():
    left, left_scale, right, right_scale = operands((16, 16), (16, 16))
    try:
        torch._scaled_mm(left, right.t(), left_scale, right_scale.t().contiguous(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True
