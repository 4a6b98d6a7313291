"""Search spaces, read from text: by hand, at random, and with the recipe's own refusals."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8rl_torchrl.recipes import A2CConfig, ActorCriticConfig, PPOConfig
from fp8rl_torchrl.recipes.search import Choices, Range, read_options, read_space

CONFIG = ActorCriticConfig(total_frames=1000)


class Wanting:
    """A trial that takes the value it was made with, and notes what it was offered."""

    def __init__(self, **wanted):
        self.wanted, self.offered = wanted, {}

    def suggest_categorical(self, name, choices):
        self.offered[name] = choices
        return self.wanted[name]

    def suggest_int(self, name, low, high, *, log=False):
        self.offered[name] = ("int", low, high, log)
        return self.wanted[name]

    def suggest_float(self, name, low, high, *, log=False):
        self.offered[name] = ("float", low, high, log)
        return self.wanted[name]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lr=log:1e-4:1e-2", Range("lr", 1e-4, 1e-2, True)),
        ("gamma=0.9:1", Range("gamma", 0.9, 1.0, False)),
        ("batch_size=16:64", Range("batch_size", 16, 64, False)),
        ("batch-size=log:16:64", Range("batch_size", 16, 64, True)),
        ("batch_size=32,64", Choices("batch_size", (32, 64))),
        ("lr=1e-3,none", Choices("lr", (1e-3, None))),
        ("hidden=64,128,64x32", Choices("hidden", ((64,), (128,), (64, 32)))),
        ("shared=true,False", Choices("shared", (True, False))),
        ("activation=tanh,relu", Choices("activation", ("tanh", "relu"))),
        ("precision=fp32,bf16,fp8", Choices("precision", ("fp32", "bf16", "fp8"))),
        ("rollout_precision=none,bf16", Choices("rollout_precision", (None, "bf16"))),
        ("total_frames=1000,2000", Choices("total_frames", (1000, 2000))),
        ("gamma=0.9", Choices("gamma", (0.9,))),
    ],
)
def test_a_dimension_is_read_in_the_type_of_its_option(spec, expected):
    (read,) = read_space(CONFIG, [spec]).dimensions
    assert read == expected
    if isinstance(expected, Range):
        assert [type(end) for end in (read.low, read.high)] == [type(end) for end in (expected.low, expected.high)]
    else:
        assert [type(value) for value in read.values] == [type(value) for value in expected.values]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "nothing to search"),
        (["lr"], "'lr' does not say NAME=VALUES"),
        (["=1,2"], "does not say NAME=VALUES"),
        (["lr="], "does not say NAME=VALUES"),
        (["lrr=1,2"], "actor-critic has no option 'lrr'; did you mean lr?"),
        (["zzz=1,2"], "actor-critic has no option 'zzz'; there are activation, batch_size"),
        (["seed=1,2"], "seed cannot be searched: every trial is trained with each of --seeds seeds"),
        (["env=CustomEnv,CartPole-v1"], "env cannot be searched: it is the task"),
        (["algo=ppo,a2c"], "algo cannot be searched"),
        (["target_return=1:2"], "target_return cannot be searched"),
        (["lr=1e-3,1e-2", "lr=1:2"], "lr is given twice"),
        (["lr=1e-3,1e-3"], "lr names 0.001 twice"),
        (["hidden=64,64x64,64"], "hidden names 64 twice"),
        (["lr=fast,slow"], "lr takes a finite number or none; got 'fast'"),
        (["gamma=nan,1"], "gamma takes a finite number; got 'nan'"),
        (["gamma=0:inf"], "gamma takes a finite number; got 'inf'"),
        (["batch_size=1.5,2"], "batch_size takes an integer; got '1.5'"),
        (["batch_size=16:64.5"], "batch_size takes an integer; got '64.5'"),
        (["shared=yes,no"], "shared takes true or false; got 'yes'"),
        (["activation=tanh,banana"], "activation takes one of tanh, relu; got 'banana'"),
        (["hidden=64,big"], "hidden takes widths of layers, such as (64, 64), or 64x64 as text; got 'big'"),
        (["hidden=1:2"], "hidden takes widths of layers, such as (64, 64), or 64x64 as text; got '1:2'"),
        (["lr=1e-2:1e-4"], "lr=1e-2:1e-4 is no range: 0.01 is not below 0.0001"),
        (["gamma=log:0:1"], "gamma=log:0:1 is no range of orders of magnitude: it must start above 0"),
        (["lr=exp:1:2"], "lr=exp:1:2 is no range: write LOW:HIGH or log:LOW:HIGH"),
        (["lr=1:2:3"], "lr=1:2:3 is no range: write LOW:HIGH or log:LOW:HIGH"),
        (["gamma=0.5:2"], "gamma=2.0 cannot be tried: gamma must lie in [0, 1]; got 2.0"),
        (["hidden=64,0"], "hidden=0 cannot be tried: hidden must name at least one layer"),
        (["precision=fp32,banana"], "precision=banana cannot be tried: unknown precision 'banana'"),
        (["batch_size=64,20000"], "batch_size=20000 cannot be tried: batch_size 20000 is more than replay_size 10000"),
    ],
)
def test_a_space_is_refused_in_one_sentence(specs, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        read_space(CONFIG, specs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_may_need_values_of_another_option():
    space = read_space(CONFIG, ["batch_size=64,20000", "replay_size=10000,20000"])
    assert [each.name for each in space.dimensions] == ["batch_size", "replay_size"]
    with pytest.raises(ValueError, match="batch_size=20000 cannot be tried"):
        read_space(CONFIG, ["batch_size=64,20000", "replay_size=10000,15000"])
    read_space(PPOConfig(), ["batch_size=512,768", "frames_per_collection=4096,3072"])
    with pytest.raises(ValueError, match="batch_size=768 cannot be tried: batch_size must divide"):
        read_space(PPOConfig(), ["batch_size=512,768"])


def test_what_a_trial_is_offered_and_what_it_becomes():
    space = read_space(CONFIG, ["lr=log:1e-4:1e-2", "hidden=64,64x32", "batch_size=16:64", "shared=true,false"])
    trial = Wanting(lr=3e-3, hidden="64x32", batch_size=20, shared=False)
    options = space.suggest(trial)
    assert options == {"lr": 3e-3, "hidden": (64, 32), "batch_size": 20, "shared": False}
    assert trial.offered == {
        "lr": ("float", 1e-4, 1e-2, True),
        "hidden": ("64", "64x32"),
        "batch_size": ("int", 16, 64, False),
        "shared": (True, False),
    }
    assert space.decode(trial.wanted) == options
    assert space.encode(options) == trial.wanted
    assert dataclasses.replace(CONFIG, **options).hidden == (64, 32)
    assert space.describe() == {
        "lr": ["log", 1e-4, 1e-2],
        "hidden": ["64", "64x32"],
        "batch_size": ["linear", 16, 64],
        "shared": [True, False],
    }


def test_a_start_lies_in_the_space():
    space = read_space(CONFIG, ["lr=log:1e-4:1e-2", "hidden=64,64x32", "entropy_coeff=0:1"])
    assert space.encode(read_options(CONFIG, ["hidden=64x32", "lr=1e-4"])) == {"hidden": "64x32", "lr": 1e-4}
    assert space.encode({}) == {}
    for start, message in {
        "lr=0.1": "lr=0.1 is not between 0.0001 and 0.01",
        "lr=none": "lr=None is not between",
        "hidden=32": "hidden=32 is none of 64, 64x32",
        "gamma=0.5": "gamma is not searched; the space has lr, hidden, entropy_coeff",
    }.items():
        with pytest.raises(ValueError, match=message):
            space.encode(read_options(CONFIG, [start]))


def test_a_grid_has_the_choices_and_no_range():
    space = read_space(CONFIG, ["lr=1e-3,1e-2", "hidden=64,64x32", "shared=true,false"])
    assert space.grid() == {"lr": [1e-3, 1e-2], "hidden": ["64", "64x32"], "shared": [True, False]}
    with pytest.raises(ValueError, match=r"a grid needs the points of lr: write lr=0\.0001,0\.01"):
        read_space(CONFIG, ["lr=log:1e-4:1e-2", "shared=true,false"]).grid()


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.booleans())
def test_a_range_of_any_two_numbers_keeps_them_exactly(one, other, log):
    low, high = sorted((one, other))
    spec = f"max_weight={'log:' if log else ''}{low!r}:{high!r}"
    if low == high:
        with pytest.raises(ValueError, match="is not below"):
            read_space(CONFIG, [spec])
    else:
        assert read_space(CONFIG, [spec]).dimensions == (Range("max_weight", low, high, log),)


@given(st.lists(st.lists(st.integers(1, 512), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5, unique=True))
def test_layers_are_read_back_as_they_were_written(layers):
    text = ",".join("x".join(map(str, widths)) for widths in layers)
    (read,) = read_space(CONFIG, [f"hidden={text}"]).dimensions
    assert read == Choices("hidden", tuple(layers))
    assert [read.decode(read.encode(widths)) for widths in layers] == layers


@given(st.text(max_size=20), st.sampled_from(["lr", "hidden", "shared", "activation", "batch_size", "gamma"]))
def test_any_text_is_read_or_refused(text, name):
    try:
        space = read_space(CONFIG, [f"{name}={text}"])
    except ValueError:
        return
    for value in space.dimensions[0].probes:
        assert not isinstance(value, float) or math.isfinite(value)
        dataclasses.replace(CONFIG, **{name: value})


def test_options_of_another_recipe_are_not_there():
    read_space(PPOConfig(), ["clip_epsilon=0.1,0.2"])
    with pytest.raises(ValueError, match="a2c has no option 'clip_epsilon'"):
        read_space(A2CConfig(), ["clip_epsilon=0.1,0.2"])
