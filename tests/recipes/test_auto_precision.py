"""Precision auto: what is measured decides, once; it is cached, recorded and put in the place of the word."""

import dataclasses
import itertools
import json
import math
import time
from statistics import median

import pytest

from fp8rl_torchrl.precision.convert import ConversionError
from fp8rl_torchrl.recipes import A2CConfig, ActorCriticConfig, PPOConfig, build, resolve_precision
from fp8rl_torchrl.recipes.auto_precision import candidates, choose_precision, fastest, measure

SMALL = {"num_envs": 4, "frames_per_collection": 16, "hidden": (8,), "device": "cpu", "compile": "off"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is read from, or left in, the user's own cache."""
    monkeypatch.setenv("FP8RL_TORCHRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fp8rl_torchrl.recipes.auto_precision.TURN_SECONDS", 0.002)
    return tmp_path / "cache" / "precision.json"


def busy(seconds):
    def update():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return update


@pytest.mark.parametrize(("slow", "expected"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_faster_one_is_chosen(slow, expected):
    auto = choose_precision({"a": 1}, "cpu", lambda name: busy(0.004 if name == slow else 0.0004))
    assert auto.name == expected
    assert set(auto.seconds) == {"fp32", "bf16"}
    assert all(len(times) == 5 for times in auto.seconds.values())
    assert median(auto.seconds[slow]) >= 0.004
    assert auto.name in str(auto)


def test_it_goes_by_the_median():
    assert fastest({"fp32": (1.0, 1.0, 9.0, 9.0, 1.0), "bf16": (2.0, 2.0, 0.1, 0.1, 2.0)}) == "fp32"
    assert fastest({"fp32": (1.0,), "bf16": (1.0,)}) == "fp32"


def test_a_second_time_nothing_is_measured(cache):
    first = choose_precision({"width": 64}, "cpu", lambda name: busy(0.0005))
    assert not first.cached

    def refuse(name):
        raise AssertionError("measured again")

    again = choose_precision({"width": 64}, "cpu", refuse)
    assert again.cached
    assert (again.name, again.seconds) == (first.name, first.seconds)
    assert "measured earlier" in str(again)
    with pytest.raises(AssertionError, match="measured again"):  # another configuration is another question
        choose_precision({"width": 128}, "cpu", refuse)
    (record,) = json.loads(cache.read_text()).values()
    assert record["key"] == {"width": 64}


def test_a_spoiled_cache_is_said_and_replaced(cache):
    cache.parent.mkdir()
    cache.write_text("{not json")
    with pytest.warns(UserWarning, match="measured anew"):
        choose_precision({}, "cpu", lambda name: busy(0.0005))
    assert json.loads(cache.read_text())


def test_what_cannot_be_converted_is_left_out():
    def make(name):
        if name == "bf16":
            raise ConversionError("no layer")
        return busy(0.0005)

    assert set(choose_precision({}, "cpu", make).seconds) == {"fp32"}


def test_the_candidates_of_a_cpu():
    assert candidates("cpu") == ("fp32", "bf16")


def test_turns_are_interleaved():
    order = []
    measure({name: lambda name=name: order.append(name) for name in ("a", "b")}, "cpu")
    switches = sum(first != second for first, second in itertools.pairwise(order))
    assert switches == 1 + 2 * 5  # the warm-ups of one, then of the other, then five turns of both


@pytest.mark.parametrize("config", [A2CConfig(**SMALL), PPOConfig(**SMALL, batch_size=8)])
def test_real_updates_are_measured(config, cache):
    config = dataclasses.replace(config, precision="auto")
    resolved, auto = resolve_precision(config)
    assert resolved.precision == auto.name
    assert dataclasses.replace(resolved, precision="auto") == config
    assert all(math.isfinite(t) and t > 0 for times in auto.seconds.values() for t in times)
    key = next(iter(json.loads(cache.read_text()).values()))["key"]
    assert key["hidden"] == [8]
    assert "seed" not in key
    # Another seed or length is the same question, another width is not.
    assert resolve_precision(dataclasses.replace(config, seed=9, total_frames=160))[1].cached
    assert not resolve_precision(dataclasses.replace(config, hidden=(16,)))[1].cached


def test_build_takes_it_and_a_given_precision_stays():
    options = {**SMALL, "replay_size": 64, "min_replay": 8, "batch_size": 8}
    pipeline = build(ActorCriticConfig(**options, precision="auto"))
    assert pipeline.config.precision in ("fp32", "bf16")
    assert pipeline.step.precision.name == pipeline.config.precision
    config = ActorCriticConfig(**options, precision="fp16")
    assert resolve_precision(config) == (config, None)


def test_unresolved_it_is_refused():
    with pytest.raises(ValueError, match="resolve_precision"):
        A2CConfig(**SMALL, precision="auto").resolved()


@pytest.mark.slow
def test_the_choice_is_within_ten_percent_of_the_best(monkeypatch, tmp_path):
    """Or inside the noise of the measurement: judged by five fresh turns of every candidate."""
    monkeypatch.setattr("fp8rl_torchrl.recipes.auto_precision.TURN_SECONDS", 0.2)
    config = A2CConfig(precision="auto", num_envs=256, frames_per_collection=2048, device="cpu", compile="off")
    _, auto = resolve_precision(config)
    monkeypatch.setenv("FP8RL_TORCHRL_CACHE", str(tmp_path / "another"))
    _, fresh = resolve_precision(config)
    assert not fresh.cached
    best = min(median(times) for times in fresh.seconds.values())
    noise = max(max(times) - min(times) for times in fresh.seconds.values())
    assert median(fresh.seconds[auto.name]) <= max(1.1 * best, best + noise)
