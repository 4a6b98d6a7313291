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


# --- policies ---


def test_a_policy_without_an_action_is_refused():
    collector = build(FusedCollector, CustomEnv(4, seed=0), lambda _: lambda td: td.set("other", td["observation"]))
    with pytest.raises(KeyError, match="action"):
        next(iter(collector))


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
    for row, given in zip(batch.unbind(-1), seen, strict=True):
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
    def policy(td):
        raise ZeroDivisionError

    collector = build(FusedCollector, CustomEnv(4, seed=0), lambda _: policy)
    collector.env.is_closed = False
    with pytest.raises(ZeroDivisionError):
        next(iter(collector))
    assert collector.env.is_closed


def test_two_collectors_of_one_environment_are_independent():
    env = CustomEnv(4, seed=0, max_steps=5)
    collectors = [build(FusedCollector, env, in_place) for _ in range(2)]
    expected = take(build(FusedCollector, CustomEnv(4, seed=0, max_steps=5), in_place), 2)
    first = next(iter(collectors[0])).clone()
    take(collectors[1], 1)
    assert_same_batches([first, *take(collectors[0], 1)], expected)
