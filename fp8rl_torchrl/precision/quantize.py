"""Scaling and casting to FP8, as pure functions of tensors.

A tensor ``x`` is represented by codes ``q`` in FP8 and a scale ``s`` in FP32, with ``x ≈ q / s``. Casts clamp
explicitly, because PyTorch's own do not agree on what lies beyond the format (in e4m3, 2.11 gives NaN, later versions
the maximum; in e5m2, infinity), and whatever is not finite stays visible: it makes its scale NaN, and with it every
code under that scale.
Codes and scales are the same bits in every PyTorch version and in eager, compiled and captured code, but for the sign
of a NaN, which means nothing.
"""

from __future__ import annotations

import torch

from fp8rl_torchrl.precision.recipe import Cast, Format, Scaling

DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""The dtype of each FP8 format."""

MIN_AMAX = 1e-12
"""A smaller largest magnitude counts as this one, so that a tensor of zeros has a finite scale (as in torchao)."""

_MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
_MIN_EXPONENT = {"e4m3": -6, "e5m2": -14}
# Both formats end at 1.75 · 2^k.
_MAX_EXPONENT = {"e4m3": 8, "e5m2": 15}


def largest(format: Format) -> float:
    """The largest finite number of a format: 448 for ``e4m3``, 57344 for ``e5m2``."""
    return torch.finfo(DTYPES[format]).max


def amax_of(x: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """The largest magnitude of each row, or of each matrix.

    Args:
        x: ``[..., R, C]``, any floating dtype.
        scaling: ``row`` or ``tensor``.

    Returns:
        float32 ``[..., R, 1]`` or ``[..., 1, 1]``; 0 where there are no elements, NaN where one is NaN.
    """
    dims = (-1,) if scaling == "row" else (-2, -1)
    kept = [1 if dim - x.dim() in dims else size for dim, size in enumerate(x.shape)]
    if x.numel() == 0:
        return torch.zeros(kept, device=x.device)
    return x.detach().abs().amax(dims, keepdim=True).float()


def scale_for(amax: torch.Tensor, format: Format, power_of_two: bool = True) -> torch.Tensor:
    """The factor that brings a largest magnitude to the end of a format's range, and never past it.

    Args:
        amax: Largest magnitudes, float32, any shape, ≥ 0.
        format: The FP8 format.
        power_of_two: Round down to a power of two.

    Returns:
        float32 of the same shape: finite and positive, or NaN where ``amax`` is not finite.
    """
    clamped = amax.clamp(min=MIN_AMAX)
    if power_of_two:
        # Exactly, by integers: amax = m · 2^e and the format's end is 1.75 · 2^k, so the scale is 2^(k - e), and half
        # of it where m > 1.75. Adding 0x1FFFFF carries into the exponent exactly there.
        exponent = (clamped.view(torch.int32) + 0x1FFFFF) >> 23  # biased by 127
        scale = ((127 + 127 + _MAX_EXPONENT[format] - exponent) << 23).view(torch.float32)
    else:
        # In float64, because compilers and the eager mode do not divide alike in float32.
        scale = (largest(format) / clamped.double()).float()
    return torch.where(amax < float("inf"), scale, float("nan"))


def cast_saturating(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Round to the nearest code (ties to even); finite numbers beyond the format become its largest.

    Args:
        x: float32, any shape.
        format: The FP8 format.

    Returns:
        The codes, same shape; NaN stays NaN. An infinity is clamped like any large number: `quantize` makes it NaN
        through its scale.
    """
    end = largest(format)
    return x.clamp(-end, end).to(DTYPES[format])


def cast_stochastic(x: torch.Tensor, format: Format, random_bits: torch.Tensor) -> torch.Tensor:
    """Round up or down to a neighbouring code, with the probability that makes the mean exact.

    Args:
        x: Any floating dtype, any shape.
        format: The FP8 format.
        random_bits: int32 of the same shape, uniform; the 20 lowest bits are used, so the mean is exact to 2^-20 of
            the distance between the two codes.

    Returns:
        The codes, same shape; beyond the format and not finite as in `cast_saturating`.
    """
    end, x = largest(format), x.float()
    magnitude = x.abs().clamp(max=end)
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=_MIN_EXPONENT[format])
    # The distance between codes at this magnitude, and its inverse: powers of two, made from their bits.
    shift = exponent - _MANTISSA_BITS[format]
    step, inverse = ((127 + shift) << 23).view(torch.float32), ((127 - shift) << 23).view(torch.float32)
    dither = (random_bits & 0xFFFFF).float() * 2.0**-20
    rounded = (torch.floor(magnitude * inverse + dither) * step).clamp(max=end)
    return torch.where(x.isnan(), x, rounded.copysign(x)).to(DTYPES[format])


def quantize(x: torch.Tensor, cast: Cast) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a tensor into FP8 codes and scales.

    Args:
        x: ``[..., R, C]``, any floating dtype. Rows run along the last dimension, the one that a product sums over.
        cast: Format and scaling.

    Returns:
        The codes ``[..., R, C]`` and the scales, float32 ``[..., R, 1]`` or ``[..., 1, 1]``. Where an element is not
        finite, the scale that it falls under is NaN, and so are all codes under that scale.

    Example:
        >>> codes, scale = quantize(torch.tensor([[1.0, -3.5]]), Cast("e4m3", "row"))
        >>> codes.float().tolist(), scale.tolist()
        ([[128.0, -448.0]], [[128.0]])
    """
    scale = scale_for(amax_of(x, cast.scaling), cast.format, cast.power_of_two)
    x = x.detach() if x.dtype != torch.float64 else x.detach().float()
    return cast_saturating(x * scale, cast.format), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What the codes stand for, in float32: ``codes / scale``."""
    return codes.float() / scale
