"""`FusedCollector` as a TorchRL collector: its constructor, its iteration, what it refuses."""

import inspect

import pytest
import torch
from gathering import (
    CustomEnv,
    DriftEnv,
    FusedCollector,
    agent,
    assert_same,
    assert_same_batches,
    build,
    in_place,
    take,
)
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs.utils import ExplorationType

from fp8rl_torchrl import ActorCritic
from fp8rl_torchrl.envs import make

# --- the constructor ---


def assert_words_of_torchrl(kind, own=("compile", "cudagraph")):
    upstream = inspect.signature(Collector).parameters
    for name, parameter in inspect.signature(kind).parameters.items():
        if name not in own:
            assert name in upstream
            assert (parameter.kind, parameter.default) == (upstream[name].kind, upstream[name].default), name


def test_the_words_of_the_constructor_are_torchrls():
    assert_words_of_torchrl(FusedCollector)
    assert issubclass(FusedCollector, BaseCollector)


class OwnWords(FusedCollector):
    def __init__(self, env, *, steps=8):
        super().__init__(env, frames_per_batch=steps)


class OwnDefaults(FusedCollector):
    def __init__(self, create_env_fn, *, frames_per_batch, exploration_type=ExplorationType.MODE):
        super().__init__(create_env_fn, frames_per_batch=frames_per_batch, exploration_type=exploration_type)


@pytest.mark.parametrize("kind", [OwnWords, OwnDefaults])
def test_other_words_and_defaults_are_found(kind):
    with pytest.raises(AssertionError):
        assert_words_of_torchrl(kind)


def test_an_environment_or_a_function_that_makes_one():
    expected = take(build(FusedCollector, CustomEnv(4, seed=0)))
    policy = agent(CustomEnv(4, seed=0))
    collector = FusedCollector(lambda: CustomEnv(4, seed=0), policy, frames_per_batch=80, compile=False)
    assert_same_batches(take(collector), expected)


@pytest.mark.parametrize("frames", [0, -8, 3, 10])
def test_frames_that_make_no_whole_steps_are_refused(frames):
    message = f"frames_per_batch must be a positive multiple of the 4 environments; got {frames}"
    with pytest.raises(ValueError, match=message):
        FusedCollector(CustomEnv(4), frames_per_batch=frames)


@pytest.mark.parametrize("frames", [0, -2])
def test_a_total_of_no_frames_is_refused(frames):
    with pytest.raises(ValueError, match=f"total_frames must be >= 1, or -1 for no end; got {frames}"):
        FusedCollector(CustomEnv(4), frames_per_batch=8, total_frames=frames)


def test_a_graph_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="cudagraph=True needs an environment on a GPU; this one is on cpu"):
        FusedCollector(CustomEnv(4), frames_per_batch=8, cudagraph=True)


@pytest.mark.parametrize("option", ["off", 1, None])
def test_a_switch_is_on_or_off(option):
    with pytest.raises(TypeError, match=f"compile must be True or False; got {option!r}"):
        FusedCollector(CustomEnv(4), frames_per_batch=8, compile=option)


def test_what_makes_no_environment_is_refused():
    with pytest.raises(TypeError, match=r"such as fp8rl_torchrl.envs.make.*got 'CustomEnv'"):
        FusedCollector("CustomEnv", frames_per_batch=8)


# --- policies ---


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (agent(make("CartPole-v1", num_envs=4)), r"cannot act on observations \[4, 2\].*shapes cannot be multiplied"),
        (ActorCritic.for_env(CustomEnv(4)), "missing the required"),
        ("policy", "'str' object is not callable"),
        (lambda seen: seen, "writes no 'action'"),
        (lambda seen: seen.set("action", torch.zeros(4)), r"torch.float32 \[4\], not torch.int64 \[4\]"),
        (lambda seen: seen.set("action", torch.zeros(4, 1).long()), r"torch.int64 \[4, 1\], not torch.int64 \[4\]"),
    ],
)
def test_a_policy_that_cannot_act_is_refused_before_anything_is_compiled(policy, message):
    with pytest.raises(ValueError, match=message) as raised:
        FusedCollector(CustomEnv(4, seed=0), policy, frames_per_batch=8)
    assert "CustomEnv needs a TensorDictModule that was made for it" in str(raised.value)


def test_trying_a_policy_draws_no_random_number():
    env = CustomEnv(4, seed=0)
    torch.manual_seed(0)
    FusedCollector(env, agent(env), frames_per_batch=8)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    agent(env)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_policy_overwrites_is_stored_and_what_it_keeps_to_itself_is_not():
    def policy(td):
        td.set("_hidden", td["observation"] * 2).set("observation", td["observation"].clamp(-0.1, 0.1))
        return td.set(("nested", "sign"), td["_hidden"].sign()).set("action", torch.full(td.batch_size, 1))

    expected, got = (take(build(kind, CustomEnv(4, seed=0), lambda _: policy)) for kind in (Collector, FusedCollector))
    assert_same_batches(got, expected)
    assert got[0]["observation"].abs().max() <= 0.1 < got[0]["next", "observation"].abs().max()
    assert "_hidden" not in got[0].keys()


def test_a_policy_sees_what_the_environment_wrote():
    seen = []

    def policy(td):
        seen.append(td.clone())
        return td.set("action", torch.zeros(td.batch_size, dtype=torch.int64))

    collector = build(FusedCollector, CustomEnv(4, seed=0, max_steps=3), lambda _: policy, steps=9)
    (batch,) = take(collector, 1)
    for row, given in zip(batch.unbind(-1), seen[1:], strict=True):  # the first one only tries the policy
        for key in given.keys(True, True):
            assert torch.equal(row[key], given[key]), key
    assert set(seen[0].keys(True, True)) == set(CustomEnv(4).reset().keys(True, True))


# --- iteration ---


@pytest.mark.parametrize(("total", "batches"), [(1, 1), (32, 1), (33, 2), (96, 3)])
def test_it_ends_with_the_total_of_frames(total, batches):
    collector = build(FusedCollector, CustomEnv(4, seed=0), steps=8, total_frames=total)
    assert len(collector) == batches
    assert [batch.numel() for batch in collector] == [32] * batches
    assert list(collector) == []
    stats = collector.stats()
    assert (stats["frames"], stats["batches"], stats["completed"]) == (32 * batches, batches, True)


def test_without_a_total_there_is_no_end():
    collector = build(FusedCollector, CustomEnv(4, seed=0), steps=8)
    assert len(take(collector, 50)) == 50
    with pytest.raises(RuntimeError, match="Non-terminating"):
        len(collector)
    assert collector.stats() == {"frames": 1600, "batches": 50, "requested_frames_per_batch": 32}


def test_iterating_again_goes_on():
    whole = take(build(FusedCollector, CustomEnv(4, seed=0), in_place), 3)
    collector = build(FusedCollector, CustomEnv(4, seed=0), in_place)
    assert_same_batches([*take(collector, 1), *take(collector, 2)], whole)


def test_what_postproc_returns_is_yielded_between_the_hooks():
    calls = []

    def postproc(td):
        calls.append("postproc")
        return td.reshape(-1).set("twice", 2 * td["next", "reward"].reshape(-1, 1))

    streams = []
    for kind in (Collector, FusedCollector):
        collector = build(kind, CustomEnv(4, seed=0), postproc=postproc)
        collector.pre_collect_hook = lambda: calls.append("before")
        collector.post_collect_hook = lambda td: calls.append(tuple(td.shape))
        streams.append(take(collector, 2))
        assert calls == ["before", "postproc", (80,)] * 2
        calls.clear()
    for expected, got in zip(*streams, strict=True):
        assert_same(got, expected)


def test_without_numbers_of_episodes_nothing_else_differs():
    numbered, plain = (
        take(build(FusedCollector, DriftEnv(4, seed=0), track_traj_ids=track)) for track in (True, False)
    )
    assert "collector" not in plain[0].keys()
    assert_same_batches(plain, [batch.exclude("collector") for batch in numbered])


def test_shutdown_closes_the_environment_once():
    collector = build(FusedCollector, CustomEnv(4, seed=0))
    collector.env.is_closed = False  # as environments that hold something outside of PyTorch declare it
    collector.shutdown(close_env=False)
    assert not collector.env.is_closed
    for _ in range(2):
        collector.shutdown()
        assert collector.env.is_closed


def test_a_policy_that_raises_shuts_down():
    calls = []

    def policy(td):
        calls.append(1)
        return td.set("action", torch.ones(td.batch_size, dtype=torch.int64) // (2 - len(calls)))

    collector = build(FusedCollector, CustomEnv(4, seed=0), lambda _: policy)
    collector.env.is_closed = False
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        next(iter(collector))
    assert collector.env.is_closed


def test_two_collectors_of_one_environment_are_independent():
    env = CustomEnv(4, seed=0, max_steps=5)
    collectors = [build(FusedCollector, env, in_place) for _ in range(2)]
    expected = take(build(FusedCollector, CustomEnv(4, seed=0, max_steps=5), in_place), 2)
    first = next(iter(collectors[0])).clone()
    take(collectors[1], 1)
    assert_same_batches([first, *take(collectors[0], 1)], expected)
