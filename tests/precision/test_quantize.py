"""Scales and codes: numbers worked out by hand, the same bits everywhere, and nothing hidden."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import CASTS, FORMATS, name_of, normal, relative_error

from fp8rl_torchrl.precision.quantize import (
    DTYPES,
    MIN_AMAX,
    amax_of,
    cast_saturating,
    dequantize,
    largest,
    quantize,
    scale_for,
)
from fp8rl_torchrl.precision.recipe import Cast

nan, inf = math.nan, math.inf
version = tuple(map(int, torch.__version__.split(".")[:2]))
casts = pytest.mark.parametrize("cast", CASTS, ids=name_of)


def bits(codes):
    return codes.view(torch.uint8).tolist()


def next_above(number):
    return torch.tensor(number).nextafter(torch.tensor(inf)).item()


def next_below(number):
    return torch.tensor(number).nextafter(torch.tensor(0.0)).item()


# --- amax ---


def test_amax_of_rows_and_of_matrices():
    x = torch.tensor([[[1.0, -3.0], [0.5, 0.0]], [[-0.0, 0.0], [8.0, -8.0]]])
    assert amax_of(x, "row").tolist() == [[[3.0], [0.5]], [[0.0], [8.0]]]
    assert amax_of(x, "tensor").tolist() == [[[3.0]], [[8.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_amax_is_float32_whatever_the_dtype(dtype):
    amax = amax_of(torch.tensor([[0.75, -1.5]], dtype=dtype), "row")
    assert amax.dtype == torch.float32
    assert amax.item() == 1.5


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0, 3, 8), (2, 3, 0)])
@casts
def test_an_empty_batch(shape, cast):
    codes, scale = quantize(torch.empty(shape), cast)
    assert codes.shape == shape
    assert codes.dtype == DTYPES[cast.format]
    assert scale.shape == ((*shape[:-1], 1) if cast.scaling == "row" else (*shape[:-2], 1, 1))
    assert scale.isfinite().all()


# --- scales ---


@pytest.mark.parametrize(
    ("format", "amax", "scale"),
    [
        # e4m3 ends at 448 = 1.75 · 2^8.
        ("e4m3", 448.0, 1.0),
        ("e4m3", next_above(448.0), 0.5),
        ("e4m3", next_below(448.0), 1.0),
        ("e4m3", 1.75, 256.0),
        ("e4m3", next_above(1.75), 128.0),
        ("e4m3", 1.0, 256.0),  # and not 448
        ("e4m3", 2.0, 128.0),
        ("e4m3", next_below(2.0), 128.0),
        ("e4m3", 1.75 * 2.0**-20, 2.0**28),
        ("e4m3", 3.4028234663852886e38, 2.0**-120),  # FP32's largest
        # e5m2 ends at 57344 = 1.75 · 2^15.
        ("e5m2", 57344.0, 1.0),
        ("e5m2", next_above(57344.0), 0.5),
        ("e5m2", 1.75, 32768.0),
        ("e5m2", next_above(1.75), 16384.0),
        ("e5m2", 1.0, 32768.0),
        ("e5m2", 3.4028234663852886e38, 2.0**-113),
        # Below 1e-12 = 1.0995 · 2^-40 all count as 1e-12.
        ("e4m3", 1e-12, 2.0**48),
        ("e4m3", 1e-45, 2.0**48),
        ("e4m3", 0.0, 2.0**48),
        ("e5m2", 0.0, 2.0**55),
    ],
)
def test_power_of_two_scales_by_hand(format, amax, scale):
    assert scale_for(torch.tensor([amax]), format).item() == scale


@pytest.mark.parametrize(
    ("format", "amax", "scale"),
    [
        ("e4m3", 448.0, 1.0),
        ("e4m3", 3.5, 128.0),
        ("e4m3", 1.0, 448.0),
        ("e4m3", 3.0, 149.3333282470703125),  # 448/3, rounded to FP32
        ("e5m2", 7.0, 8192.0),
        ("e5m2", 1.0, 57344.0),
        ("e4m3", 0.0, 447999985582080.0),  # 448e12, rounded to FP32
    ],
)
def test_other_scales_by_hand(format, amax, scale):
    assert scale_for(torch.tensor([amax]), format, power_of_two=False).item() == scale


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_no_scale_for_what_is_not_finite(format, power_of_two):
    assert scale_for(torch.tensor([nan, inf]), format, power_of_two).isnan().all()


magnitudes = st.floats(0, 3.4028234663852886e38, width=32)


@given(magnitudes, st.sampled_from(FORMATS))
@settings(max_examples=300, deadline=None)
def test_power_of_two_scales_reach_the_end_and_never_pass_it(amax, format):
    scale = scale_for(torch.tensor([amax]), format).item()
    assert math.frexp(scale)[0] == 0.5  # a power of two
    assert amax * scale <= largest(format)  # in float64, where the product is exact
    assert 2 * scale * max(amax, MIN_AMAX) > largest(format)  # the next power would pass it


def test_a_scale_rounded_up_would_saturate():
    # The negative twin of the test above: log2 in FP32 takes the first number beyond 1.75 for 1.75 itself.
    amax = torch.tensor([next_above(1.75)])
    rounded = torch.exp2(torch.floor(torch.log2(448 / amax)))
    assert (amax * rounded).item() > 448
    assert (amax * scale_for(amax, "e4m3")).item() <= 448


# --- codes ---


@pytest.mark.parametrize(
    ("format", "number", "code"),
    [
        ("e4m3", 1.0, 0x38),
        ("e4m3", -1.0, 0xB8),
        ("e4m3", 0.0, 0x00),
        ("e4m3", -0.0, 0x80),
        ("e4m3", 448.0, 0x7E),
        ("e4m3", 464.0, 0x7E),  # where the next number would be halfway
        ("e4m3", 465.0, 0x7E),
        ("e4m3", 1000.0, 0x7E),
        ("e4m3", -1e30, 0xFE),
        ("e4m3", 17.0, 0x58),  # between 16 and 18: to the even one
        ("e4m3", 19.0, 0x5A),  # between 18 and 20
        ("e4m3", 19.1, 0x5A),
        ("e4m3", 18.9, 0x59),
        ("e4m3", 2.0**-6, 0x08),  # the smallest normal number
        ("e4m3", 2.0**-9, 0x01),  # the smallest one
        ("e4m3", 1.5 * 2.0**-9, 0x02),
        ("e4m3", 2.5 * 2.0**-9, 0x02),
        ("e4m3", 2.0**-10, 0x00),
        ("e4m3", next_above(2.0**-10), 0x01),
        ("e4m3", 1e-45, 0x00),
        ("e5m2", 1.0, 0x3C),
        ("e5m2", -1.0, 0xBC),
        ("e5m2", 57344.0, 0x7B),
        ("e5m2", 61440.0, 0x7B),
        ("e5m2", 65536.0, 0x7B),
        ("e5m2", -3e38, 0xFB),
        ("e5m2", 1.125, 0x3C),  # between 1 and 1.25
        ("e5m2", 1.375, 0x3E),  # between 1.25 and 1.5
        ("e5m2", 2.0**-14, 0x04),
        ("e5m2", 2.0**-16, 0x01),
        ("e5m2", 2.0**-17, 0x00),
        ("e5m2", 1.5 * 2.0**-16, 0x02),
    ],
)
def test_codes_by_hand(format, number, code):
    assert bits(cast_saturating(torch.tensor([number]), format)) == [code]


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_casts_to_itself(format):
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[format])
    finite = codes.float().isfinite()
    assert finite.sum() == {"e4m3": 254, "e5m2": 248}[format]
    assert bits(cast_saturating(codes.float()[finite], format)) == bits(codes[finite])
    assert cast_saturating(torch.tensor([nan, -nan]), format).float().isnan().all()


@pytest.mark.parametrize("format", FORMATS)
def test_the_nearest_code_is_chosen(format):
    every = torch.arange(256, dtype=torch.uint8).view(DTYPES[format]).float()
    every = every[every.isfinite()].double()
    x = normal(2000, seed=3) * 10.0 ** (torch.arange(2000) % 8 - 4)
    x = x.clamp(-largest(format), largest(format))
    distance = (cast_saturating(x, format).double() - x.double()).abs()
    assert torch.equal(distance, (every - x[:, None].double()).abs().amin(1))


def test_pytorchs_own_cast_is_not_used():
    # Why the clamp is explicit: 1000 becomes NaN in PyTorch 2.11, 448 in later ones, and in e5m2 1e6 becomes inf.
    beyond = torch.tensor([1000.0, 1e6])
    assert math.isnan(beyond.to(DTYPES["e4m3"]).float()[0]) is (version < (2, 12))
    assert beyond.to(DTYPES["e5m2"]).float()[1] == inf
    assert [cast_saturating(beyond, format).float().tolist() for format in FORMATS] == [[448, 448], [1024, 57344]]


# --- both together ---


def test_rows_by_hand():
    x = torch.tensor([[1.0, -3.5, 0.1], [0.0, 0.0, -0.0], [1000.0, 0.6, -1.0]])
    codes, scale = quantize(x, Cast("e4m3", "row"))
    assert scale.tolist() == [[128.0], [2.0**48], [0.25]]
    # 0.1 · 128 = 12.8 → 13; 1000/4 = 250 → 256, since codes are 16 apart there; 0.6/4 = 0.15 → 0.15625.
    assert codes.float().tolist() == [[128.0, -448.0, 13.0], [0.0, 0.0, -0.0], [256.0, 0.15625, -0.25]]
    assert dequantize(codes, scale).tolist() == [[1.0, -3.5, 13 / 128], [0.0, 0.0, 0.0], [1024.0, 0.625, -1.0]]


def test_a_tensor_by_hand():
    x = torch.tensor([[1.0, -3.5], [7.0, 0.0]])
    codes, scale = quantize(x, Cast("e5m2", "tensor", power_of_two=False))
    assert scale.tolist() == [[8192.0]]
    assert codes.float().tolist() == [[8192.0, -28672.0], [57344.0, 0.0]]


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (1, 1)])
@casts
def test_an_all_zero_tensor(shape, cast):
    codes, scale = quantize(torch.zeros(shape), cast)
    # 448e12 and 57344e12, rounded down to a power of two or to FP32.
    expected = {
        ("e4m3", True): 2.0**48,
        ("e4m3", False): 447999985582080.0,
        ("e5m2", True): 2.0**55,
        ("e5m2", False): 57343998154506240.0,
    }
    assert scale.unique().tolist() == [expected[cast.format, cast.power_of_two]]
    assert not codes.view(torch.uint8).any()
    assert not dequantize(codes, scale).any()


def test_subnormals():
    # Numbers under 1e-12 are scaled as if the largest were 1e-12: by 2^48. FP32's subnormals vanish.
    x = torch.tensor([[1.5 * 2.0**-50, 2.0**-57, 2.0**-58, 2.0**-130, -1e-45]])
    codes, scale = quantize(x, Cast("e4m3", "row"))
    assert scale.item() == 2.0**48
    # 1.5 · 2^-2 is normal; 2^-9 is e4m3's smallest; 2^-10 ties to zero.
    assert bits(codes) == [[0x2C, 0x01, 0x00, 0x00, 0x80]]
    assert dequantize(codes, scale).tolist() == [[1.5 * 2.0**-50, 2.0**-57, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [nan, -nan, inf, -inf])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_what_is_not_finite_makes_its_row_nan_and_no_other(bad, format, power_of_two):
    x = normal(3, 4)
    x[1, 2] = bad
    codes, scale = quantize(x, Cast(format, "row", power_of_two))
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert codes.float().isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4]
    clean = x.clone()
    clean[1] = 0
    assert bits(codes[::2]) == bits(quantize(clean, Cast(format, "row", power_of_two))[0][::2])


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_makes_its_tensor_nan(bad, format):
    x = normal(2, 3, 4)
    x[1, 2, 3] = bad
    codes, scale = quantize(x, Cast(format, "tensor"))
    assert scale.isnan().flatten().tolist() == [False, True]
    assert codes.float().isnan().flatten(1).all(1).tolist() == [False, True]
    assert codes[0].float().isfinite().all()


@casts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_the_codes_of_the_same_numbers_in_float32(cast, dtype):
    x = normal(16, 32, seed=5).to(dtype)
    codes, scale = quantize(x, cast)
    expected, expected_scale = quantize(x.float(), cast)
    assert bits(codes) == bits(expected)
    assert torch.equal(scale, expected_scale)


def test_float64_beyond_float32_is_not_finite():
    codes, _ = quantize(torch.tensor([[1e300, 1.0]], dtype=torch.float64), Cast("e4m3", "row"))
    assert codes.float().isnan().all()


@casts
def test_the_largest_magnitude_lands_at_the_end_of_the_range(cast):
    x = normal(64, 96, seed=6) * 10.0 ** (torch.arange(64) % 20 - 10)[:, None]
    codes, _ = quantize(x, cast)
    amax = codes.float().abs().amax(-1) if cast.scaling == "row" else codes.float().abs().max()
    end = largest(cast.format)
    assert (amax <= end).all()
    assert (amax >= (end / 2 if cast.power_of_two else end)).all()


@casts
def test_what_quantizing_costs(cast):
    # Half the distance between codes is at most 2^-4 (e4m3) or 2^-3 (e5m2) of a number, and 0.4 of that on average.
    x = normal(64, 512, seed=7)
    error = relative_error(dequantize(*quantize(x, cast)), x)
    unit = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}[cast.format]
    assert 0.3 * unit < error < 0.5 * unit


@pytest.mark.parametrize("format", FORMATS)
def test_an_unscaled_cast_is_wrong(format):
    # Such are gradients of an averaged loss: they vanish.
    x = normal(64, 512, seed=7) * 1e-6
    assert relative_error(cast_saturating(x, format).float(), x) > 0.9
    assert relative_error(dequantize(*quantize(x, Cast(format, "row"))), x) < 0.06


@pytest.mark.parametrize("format", FORMATS)
def test_rows_do_not_depend_on_the_batch(format):
    x = normal(8, 32, seed=8)
    outlier = x.clone()
    outlier[0] *= 1e9
    alone, beside = (quantize(each, Cast(format, "row"))[0] for each in (x, outlier))
    assert bits(alone[1:]) == bits(beside[1:])
    # The negative twin: one scale for the tensor drags all rows along.
    alone, beside = (dequantize(*quantize(each, Cast(format, "tensor")))[1:] for each in (x, outlier))
    assert relative_error(beside, x[1:]) > 2 * relative_error(alone, x[1:])


@casts
def test_a_transposed_view_gives_the_codes_of_its_copy(cast):
    x = normal(24, 40, seed=9)
    assert bits(quantize(x.mT, cast)[0]) == bits(quantize(x.mT.contiguous(), cast)[0])


def test_no_gradient_goes_through():
    x = normal(2, 3).requires_grad_()
    codes, scale = quantize(x, Cast("e4m3", "row"))
    assert not codes.requires_grad
    assert not scale.requires_grad


# --- the same bits everywhere ---

# Of `wide()`, by cast: the first 16 digits of SHA-256 over codes and scales. They were recorded once.
DIGESTS = {
    "e4m3/row/2^n": "e88d810572b36ff6",
    "e4m3/row/any": "759a6c801ef8438d",
    "e4m3/tensor/2^n": "b277006921fbf87f",
    "e4m3/tensor/any": "d1beeba5ecb76e17",
    "e5m2/row/2^n": "c1fd8f8bf9abbe31",
    "e5m2/row/any": "150ebb352fa32dbe",
    "e5m2/tensor/2^n": "b6a70179db111332",
    "e5m2/tensor/any": "aba55ad4d4afe3e8",
}


def wide():
    """[64, 96] finite numbers of 2^-30 to 2^30, made by integer arithmetic alone."""
    n = torch.arange(64 * 96)
    mixed = (n * 2654435761 + 12345) % 2**32
    sign, exponent, mantissa = mixed >> 31, 127 - 30 + (mixed >> 8) % 60, (mixed * 40503) % 2**23
    return ((sign << 31) - (sign << 32) + (exponent << 23) + mantissa).int().view(torch.float32).view(64, 96)


@casts
def test_the_bits_are_those_recorded(cast):
    codes, scale = quantize(wide(), cast)
    digest = hashlib.sha256(codes.view(torch.uint8).numpy().tobytes() + scale.numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name_of(cast)]
