"""Stochastic rounding: the mean is exact, the bits decide, and what needs no rounding is left alone."""

import math

import pytest
import torch
from products import FORMATS, normal

from fp8rl_torchrl.precision.quantize import DTYPES, cast_saturating, cast_stochastic, largest

ALL = 2**20
"""Only the 20 lowest random bits count, so this many draws are all there are."""

formats = pytest.mark.parametrize("format", FORMATS)


def random_bits(*shape, seed=0):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # 17 is halfway between 16 and 18; the dither decides: below half it goes down.
    x = torch.full((4,), 17.0)
    draws = torch.tensor([0, ALL // 2 - 1, ALL // 2, ALL - 1], dtype=torch.int32)
    assert cast_stochastic(x, "e4m3", draws).float().tolist() == [16, 16, 18, 18]
    assert cast_stochastic(-x, "e4m3", draws).float().tolist() == [-16, -16, -18, -18]


@pytest.mark.parametrize(
    ("format", "number"),
    [
        ("e4m3", 17.25),  # 5/8 of the way from 16 to 18
        ("e4m3", -1.01),
        ("e4m3", 447.0),
        ("e4m3", 0.3 * 2.0**-9),  # under the smallest code
        ("e4m3", 1.7 * 2.0**-8),
        ("e5m2", 1.1),
        ("e5m2", -50000.0),
        ("e5m2", 0.3 * 2.0**-16),
        ("e5m2", 15.99),
    ],
)
def test_the_mean_over_all_draws_is_exact(format, number):
    x = torch.tensor(number)
    codes = cast_stochastic(x.expand(ALL), format, torch.arange(ALL, dtype=torch.int32)).double()
    neighbours = codes.unique()
    assert len(neighbours) == 2
    assert neighbours[0] < x.double() < neighbours[1]
    assert (codes.mean() - x.double()).abs() <= (neighbours[1] - neighbours[0]) * 2.0**-20
    # The negative twin: to the nearest, the mean is off by far more.
    assert (cast_saturating(x, format).double() - x.double()).abs() > (neighbours[1] - neighbours[0]) * 1e-3


@formats
def test_the_same_bits_give_the_same_codes(format):
    x, draws = normal(64, 64), random_bits(64, 64)
    codes = cast_stochastic(x, format, draws)
    assert torch.equal(codes.view(torch.uint8), cast_stochastic(x, format, draws.clone()).view(torch.uint8))
    assert not torch.equal(
        codes.view(torch.uint8), cast_stochastic(x, format, random_bits(64, 64, seed=1)).view(torch.uint8)
    )


@formats
@pytest.mark.parametrize("draw", [0, ALL - 1, -1])
def test_every_code_stays_as_it_is(format, draw):
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[format])
    finite = codes.float().isfinite()
    again = cast_stochastic(codes.float(), format, torch.full((256,), draw, dtype=torch.int32))
    assert torch.equal(again[finite].view(torch.uint8), codes[finite].view(torch.uint8))  # -0 included
    assert again[codes.float().isnan()].float().isnan().all()


@formats
def test_beyond_the_format_is_clamped(format):
    end = largest(format)
    x = torch.tensor([end * 1.001, -end * 2, 1e38, -math.inf, math.inf, math.nan])
    for draw in (0, ALL - 1):
        codes = cast_stochastic(x, format, torch.full((6,), draw, dtype=torch.int32)).float()
        assert codes[:5].tolist() == [end, -end, end, -end, end]
        assert codes[5].isnan()


@formats
def test_one_of_the_two_neighbours_is_taken(format):
    every = torch.arange(256, dtype=torch.uint8).view(DTYPES[format]).float()
    every = every[every.isfinite()].unique()
    x = normal(4000, seed=2) * 10.0 ** (torch.arange(4000) % 8 - 5)
    x = x.clamp(-largest(format), largest(format))
    codes = cast_stochastic(x, format, random_bits(4000)).float()
    below = every[(torch.searchsorted(every, x, right=True) - 1).clamp(min=0)]
    above = every[torch.searchsorted(every, x).clamp(max=len(every) - 1)]
    assert ((codes == below) | (codes == above)).all()
    inside = below < above
    assert 0.4 < (codes == above)[inside].float().mean() < 0.6


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(format, dtype):
    x, draws = normal(32, 32).to(dtype), random_bits(32, 32)
    codes = cast_stochastic(x, format, draws)
    assert torch.equal(codes.view(torch.uint8), cast_stochastic(x.float(), format, draws).view(torch.uint8))


def test_a_small_update_survives_on_average_where_rounding_to_nearest_loses_it():
    # What it is for: 1000 steps of 1/64 from 16, where codes are 2 apart.
    nearest = stochastic = torch.full((256,), 16.0)
    for step in range(1000):
        nearest = cast_saturating(nearest + 2.0**-6, "e4m3").float()
        stochastic = cast_stochastic(stochastic + 2.0**-6, "e4m3", random_bits(256, seed=step)).float()
    assert nearest.unique().tolist() == [16.0]
    # The sum is 16 + 15.6; the standard deviation of a mean of 256 is about √(1000 · 2/64) / 16 = 0.35.
    assert abs(stochastic.mean().item() - 31.625) < 1.5
