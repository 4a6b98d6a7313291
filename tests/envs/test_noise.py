"""The reset noise: known values, uniform, independent in every counter, the same wherever it is computed."""

import math

import pytest
import torch

from fp8rl_torchrl.envs.noise import uniform

COUNT = 1 << 16


def counters(seed=0, index=0, episode=0, count=COUNT):
    """Three int64 counters of shape [count]; one that is None counts up from 0."""
    return [
        torch.arange(count) if value is None else torch.full((count,), value, dtype=torch.int64)
        for value in (seed, index, episode)
    ]


def reference(seed, index, episode, stream):
    """The hash in Python's unbounded integers, with every wrap written as a remainder."""

    def mix(word):
        word = (word ^ (word >> 16)) * 0x21F0AAAD % 2**32
        word = (word ^ (word >> 15)) * 0x735A2D97 % 2**32
        return word ^ (word >> 15)

    golden = 0x9E3779B9
    unsigned = seed % 2**64
    word = mix((unsigned % 2**32) ^ golden)
    for counter in (unsigned >> 32, index, episode):
        word = mix((word + counter + golden) % 2**32)
    return (mix((word + stream * golden) % 2**32) >> 8) / 2**24


def chi_square(values, bins=256):
    """Deviation from uniformity in standard deviations of the chi-square statistic."""
    expected = values.numel() / bins
    observed = torch.histc(values.double(), bins, 0, 1)
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


def correlation(first, second):
    """Pearson's coefficient in units of its standard error, about N(0, 1) for independent draws."""
    return torch.corrcoef(torch.stack((first, second)).double())[0, 1].item() * math.sqrt(first.numel())


def forgets(name):
    """The hash with one of its counters dropped."""

    def broken(seed, index, episode, *, streams):
        given = {"seed": seed, "index": index, "episode": episode}
        given[name] = torch.zeros_like(given[name])
        return uniform(**given, streams=streams)

    return broken


def assert_depends_on(draw, name):
    """Fails unless counting one counter up gives independent uniform draws."""
    values = draw(*counters(**{name: None}), streams=1)[0]
    assert abs(chi_square(values)) < 4
    assert abs(correlation(values[:-1], values[1:])) < 4


CASES = [
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (1, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (123456789, 63, 1999, 1),
    (2**31, 2**31 - 1, 2**31, 3),
    (2**32, 0, 0, 0),
    (2**63 - 1, 2**32 - 1, 2**32 - 1, 0),
    (-1, 7, 7, 1),
]


@pytest.mark.parametrize(("seed", "index", "episode", "stream"), CASES)
def test_equals_an_independent_implementation(seed, index, episode, stream):
    value = uniform(*(torch.tensor(counter) for counter in (seed, index, episode)), streams=stream + 1)[stream]
    assert value.item() == reference(seed, index, episode, stream)


def test_pinned_values():
    # A change of the hash changes every start state of every seed: recorded runs could not be repeated any more.
    values = [
        uniform(*(torch.tensor(c) for c in case[:3]), streams=case[3] + 1)[-1].item() * 2**24 for case in CASES[:5]
    ]
    assert values == [5545729, 4338807, 1602870, 6461694, 2146031]


def test_exact_multiples_of_two_to_the_minus_24_in_the_unit_interval():
    values = uniform(*counters(index=None, seed=3), streams=1)[0]
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    scaled = values.double() * 2**24
    assert torch.equal(scaled, scaled.round())
    # All 24 bits are used: odd multiples are as frequent as even ones (standard deviation 0.002).
    assert (scaled % 2).mean().item() == pytest.approx(0.5, abs=0.008)


def test_any_shape():
    zero = torch.zeros((), dtype=torch.int64)
    assert uniform(zero, zero, zero, streams=1)[0].shape == ()
    grid = torch.arange(6).reshape(2, 3)
    zeros = torch.zeros_like(grid)
    assert torch.equal(
        uniform(zeros, grid, zeros, streams=1).flatten(), uniform(*counters(index=None, count=6), streams=1)[0]
    )


@pytest.mark.parametrize("name", ["seed", "index", "episode"])
@pytest.mark.parametrize("stream", [0, 1])
def test_uniform_along_each_counter(name, stream):
    values = uniform(*counters(**{name: None}), streams=stream + 1)[stream]
    assert abs(chi_square(values)) < 4
    # Kolmogorov-Smirnov: the 0.999 quantile of the scaled distance is 1.95.
    ordered = values.double().sort().values
    distance = (ordered - torch.arange(COUNT) / COUNT).abs().max().item()
    assert distance * math.sqrt(COUNT) < 1.95


@pytest.mark.parametrize("name", ["seed", "index", "episode"])
def test_neighbours_along_each_counter_are_independent(name):
    values = uniform(*counters(**{name: None}), streams=1)[0]
    for lag in (1, 2, 64):
        assert abs(correlation(values[:-lag], values[lag:])) < 4


@pytest.mark.parametrize("pair", [("seed", "index"), ("seed", "episode"), ("index", "episode")])
def test_counters_do_not_stand_in_for_one_another(pair):
    # A hash of the sum of two counters would give the same number here.
    first = uniform(*counters(**{pair[0]: None}), streams=1)[0]
    second = uniform(*counters(**{pair[1]: None}), streams=1)[0]
    assert abs(correlation(first[1:], second[1:])) < 4


def test_streams_are_independent():
    first, second = (uniform(*counters(index=None), streams=stream + 1)[stream] for stream in (0, 1))
    assert abs(correlation(first, second)) < 4


def test_both_halves_of_the_seed_count():
    high = [uniform(*counters(seed=seed << 32, index=None), streams=1)[0] for seed in (0, 1, 2)]
    assert abs(correlation(high[0], high[1])) < 4
    assert abs(correlation(high[1], high[2])) < 4


def test_one_bit_of_a_counter_flips_half_of_the_result():
    base = uniform(*counters(index=None), streams=1)[0]
    for bit in range(16):
        flipped = uniform(*counters(index=None, episode=1 << bit), streams=1)[0]
        differing = (base * 2**24).long() ^ (flipped * 2**24).long()
        ones = sum((differing >> place & 1).double().mean().item() for place in range(24))
        assert ones == pytest.approx(12, abs=0.05)


@pytest.mark.parametrize("name", ["seed", "index", "episode"])
def test_depends_on_every_counter(name):
    assert_depends_on(uniform, name)
    with pytest.raises(AssertionError):
        assert_depends_on(forgets(name), name)


def test_a_stream_does_not_depend_on_how_many_there_are():
    arguments = counters(index=None, count=64)
    three = uniform(*arguments, streams=3)
    assert three.shape == (3, 64)
    assert torch.equal(uniform(*arguments, streams=1), three[:1])
    assert torch.equal(uniform(*arguments, streams=2), three[:2])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1,), (COUNT,), (8, 128)])
def test_the_same_when_inductor_generates_the_code(shape):
    size = math.prod(shape)
    arguments = [counter.reshape(shape) for counter in counters(seed=2**63 - 1, index=None, episode=3, count=size)]
    compiled = torch.compile(uniform, fullgraph=True)
    assert torch.equal(compiled(*arguments, streams=2), uniform(*arguments, streams=2))
    # Of arguments that do not lie side by side, as a table of starts has them.
    spread = [counter.unsqueeze(-1).expand(*shape, 3) for counter in arguments]
    assert torch.equal(compiled(*spread, streams=1), uniform(*spread, streams=1))


@pytest.mark.gpu
def test_the_same_on_a_gpu_eager_and_compiled():
    arguments = counters(seed=2**63 - 1, index=None, episode=3)
    expected = uniform(*arguments, streams=2)
    on_gpu = [counter.cuda() for counter in arguments]
    for function in (uniform, torch.compile(uniform, fullgraph=True)):
        assert torch.equal(function(*on_gpu, streams=2).cpu(), expected)
