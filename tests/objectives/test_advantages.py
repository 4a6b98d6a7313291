"""Advantages of whole rollouts: by hand, against TorchRL's, and how often the critic runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import Table
from torchrl.objectives.value import GAE
from whole_rollouts import (
    ADVANTAGE,
    ENDS,
    HALVES,
    STATE,
    VALUES,
    agent_and_rollout,
    cartpole,
    custom_env,
    most_ends,
    rollout_by_hand,
    rows_seen,
)

from fp8rl_torchrl.objectives import advantages
from fp8rl_torchrl.objectives.advantages import (
    RolloutAdvantage,
    generalized_advantage,
    last_observations,
    time_major,
    values_after,
)

ENVS = {"CustomEnv": custom_env, "CartPole": cartpole}


def table():
    return Table(torch.zeros(6, 2), VALUES)


# --- by hand ---


@pytest.mark.parametrize("episode_ends", [None, ENDS, ENDS + 3])
def test_by_hand(episode_ends):
    rollout = RolloutAdvantage(table(), **HALVES, episode_ends=episode_ends)(rollout_by_hand())
    assert torch.equal(rollout["advantage"], ADVANTAGE.unsqueeze(-1))
    assert torch.equal(rollout["value_target"], (ADVANTAGE + VALUES[STATE]).unsqueeze(-1))
    assert rollout["advantage"].dtype == rollout["value_target"].dtype == torch.float32


def test_a_value_after_a_termination_is_not_added(monkeypatch):
    """Negative twin of the above: without the mask the terminated steps, and those before them, differ."""
    whole = generalized_advantage

    def forgetful(reward, value, next_value, terminated, done, **options):
        return whole(reward, value, next_value, torch.zeros_like(terminated), done, **options)

    monkeypatch.setattr(advantages, "generalized_advantage", forgetful)
    found = RolloutAdvantage(table(), **HALVES)(rollout_by_hand())["advantage"].squeeze(-1)
    assert (found != ADVANTAGE).tolist() == [[True, True, False, False], [False, True, False, False]]


def test_the_value_after_a_truncation_is_not_that_of_the_next_episode(monkeypatch):
    """Negative twin of the above: with the value of the observation after the reset, the truncated steps differ."""
    monkeypatch.setattr(advantages, "values_after", lambda value, last, *_: torch.cat((value[1:], last[:1])))
    found = RolloutAdvantage(table(), **HALVES, episode_ends=ENDS)(rollout_by_hand())["advantage"].squeeze(-1)
    assert (found != ADVANTAGE).tolist() == [[False] * 4, [True, False, False, False]]


def test_advantages_are_not_carried_over_an_episodes_end(monkeypatch):
    """Negative twin: with ``terminated`` for ``done``, the advantage after a truncation leaks into it."""
    whole = generalized_advantage

    def leaking(reward, value, next_value, terminated, done, **options):
        return whole(reward, value, next_value, terminated, terminated, **options)

    monkeypatch.setattr(advantages, "generalized_advantage", leaking)
    found = RolloutAdvantage(table(), **HALVES)(rollout_by_hand())["advantage"].squeeze(-1)
    assert (found != ADVANTAGE).tolist() == [[False] * 4, [True, False, False, False]]


def test_without_a_trace_it_is_the_td_error_and_with_all_of_it_the_return():
    first = RolloutAdvantage(table(), gamma=0.5, lmbda=0.0)(rollout_by_hand())["advantage"].squeeze(-1)
    assert first.tolist() == [[1, 1, -2, -1], [1.5, -2, -1.5, 3]]
    # Returns to the end of the episode or of the rollout, with V there unless it terminated:
    # 1 + 3/2, 3, -1 + 0/2 + 6/4, 0 + 6/2 and 1 + 3/2, 0, 2 + 1/2 + 6/4, 1 + 6/2
    returns = RolloutAdvantage(table(), gamma=0.5, lmbda=1.0)(rollout_by_hand())["value_target"].squeeze(-1)
    assert returns.tolist() == [[2.5, 3, 0.5, 3], [2.5, 0, 4, 4]]


def test_last_observations_by_hand():
    following, truncated = torch.tensor([[10, 20], [11, 21], [12, 22]]), torch.tensor([[0, 1], [0, 0], [0, 1]]).bool()
    last, number = last_observations(following, truncated, 2)
    # Environment 0 has no truncated step: any observation will do there, and it is never used.
    assert last[0].tolist() == [12, 22]
    assert last[1:, 1].tolist() == [20, 22]
    assert number.tolist() == [[0, 1], [0, 1], [0, 2]]
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    after = values_after(value, last.float(), truncated, number)
    assert after.tolist() == [[3, 20], [5, 6], [12, 22]]


# --- against other implementations ---


def naive(reward, value, next_value, terminated, done, gamma, lmbda):
    """One environment and step at a time, in float64."""
    steps, num = reward.shape
    result = torch.zeros(steps, num, dtype=torch.float64)
    for n in range(num):
        carried = 0.0
        for t in range(steps - 1, -1, -1):
            future = 0.0 if terminated[t, n] else gamma * next_value[t, n].item()
            delta = reward[t, n].item() + future - value[t, n].item()
            carried = delta + (0.0 if done[t, n] else gamma * lmbda * carried)
            result[t, n] = carried
    return result


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 12),
    num=st.integers(1, 4),
    often=st.floats(0, 1),
    gamma=st.floats(0, 1),
    lmbda=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_rollout_equals_a_loop(steps, num, often, gamma, lmbda, seed):
    generator = torch.Generator().manual_seed(seed)
    reward, observation = (torch.randn(steps, num, generator=generator) for _ in range(2))
    terminated, truncated = (torch.rand(steps, num, generator=generator) < often / 2 for _ in range(2))
    # The critic is the identity: a step's true next observation is the next step's, but where an episode ends.
    following = torch.cat((observation[1:], torch.randn(1, num, generator=generator)))
    done = terminated | truncated
    following = torch.where(done, torch.randn(steps, num, generator=generator), following)
    expected = naive(reward, observation, following, terminated, done, gamma, lmbda)
    ends = truncated & ~terminated
    most = int(ends.sum(0).max())
    last, number = last_observations(following, ends, most)
    next_value = values_after(observation, last, ends, number)
    found = generalized_advantage(reward, observation, next_value, terminated, done, gamma=gamma, lmbda=lmbda)
    # At most 12 steps of sums of numbers of size 5.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    if most:
        last, number = last_observations(following, ends, most - 1)
        assert torch.equal(values_after(observation, last, ends, number).isnan(), ends & (number == most))


@pytest.mark.parametrize("bootstrap", ["every", "ends"])
@pytest.mark.parametrize("name", ENVS)
@pytest.mark.parametrize("shared", [True, False])
def test_equals_torchrls_gae(name, shared, bootstrap):
    agent, rollout = agent_and_rollout(ENVS[name](), shared=shared)
    assert most_ends(rollout) >= 2
    assert (rollout["next", "terminated"][:, :-1]).any()
    episode_ends = most_ends(rollout) if bootstrap == "ends" else None
    options = {"gamma": 0.9, "lmbda": 0.8}
    ours = RolloutAdvantage(agent, **options, episode_ends=episode_ends)(rollout.clone())
    theirs = GAE(value_network=agent.value, average_gae=False, vectorized=False, **options)(rollout.clone())
    for key in ("advantage", "value_target"):
        assert ours[key].shape == theirs[key].shape == (4, 40, 1)
        # Sums of about 20 numbers, at most 12 each, in another order.
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)


# --- rollouts of every layout ---


def test_a_single_environment():
    agent, rollout = agent_and_rollout(custom_env(num_envs=None))
    assert rollout.shape == (40,)
    estimate = RolloutAdvantage(agent, episode_ends=most_ends(rollout))
    batched = estimate(rollout.clone().unsqueeze(0))
    single = estimate(rollout.clone())
    assert single["advantage"].shape == (40, 1)
    torch.testing.assert_close(single["advantage"], batched["advantage"][0])


def test_a_rollout_of_one_step():
    agent, rollout = agent_and_rollout(custom_env(), steps=1)
    found = RolloutAdvantage(agent, gamma=0.5, episode_ends=0)(rollout)
    value, after = agent.state_value(rollout), agent.state_value(rollout["next"])
    torch.testing.assert_close(found["advantage"], rollout["next", "reward"] + 0.5 * after - value)


def test_the_layout_in_memory_does_not_matter():
    agent, rollout = agent_and_rollout(custom_env())
    time_first = rollout.transpose(0, 1).contiguous().transpose(0, 1)
    assert time_first["observation"].stride() != rollout["observation"].stride()
    estimate = RolloutAdvantage(agent)
    assert torch.equal(estimate(time_first)["advantage"], estimate(rollout)["advantage"])
    (observation,) = time_major(time_first, "observation")
    assert observation.shape == (40, 4, 2)
    assert observation.is_contiguous()


def test_in_keys_are_what_is_read_and_no_more():
    agent, rollout = agent_and_rollout(custom_env())
    estimate = RolloutAdvantage(agent)
    whole, selected = estimate(rollout.clone()), estimate(rollout.select(*estimate.in_keys))
    assert torch.equal(whole["advantage"], selected["advantage"])
    for missing in estimate.in_keys:
        name = missing if isinstance(missing, str) else missing[-1]
        with pytest.raises(KeyError, match=f'"{name}" not found'):
            estimate(rollout.select(*(key for key in estimate.in_keys if key != missing)))


def test_entries_are_read_by_the_models_key():
    rollout = rollout_by_hand()
    for part in (rollout, rollout["next"]):
        part.rename_key_("observation", "pixels")
    found = RolloutAdvantage(Table(torch.zeros(6, 2), VALUES, key="pixels"), **HALVES)(rollout)
    assert torch.equal(found["advantage"].squeeze(-1), ADVANTAGE)


# --- the critic's passes, and gradients ---


@pytest.mark.parametrize(("episode_ends", "rows"), [(None, 160), (0, 4), (1, 8), (5, 24)])
def test_how_many_observations_the_critic_sees(episode_ends, rows):
    agent, rollout = agent_and_rollout(custom_env())
    seen = rows_seen(agent._parts[2].module)
    RolloutAdvantage(agent, episode_ends=episode_ends)(rollout)
    assert seen == [160, rows]


def test_too_few_episode_ends_give_nan_in_that_environment():
    found = RolloutAdvantage(table(), **HALVES, episode_ends=1)(rollout_by_hand())["advantage"].squeeze(-1)
    # The second truncation of environment 1 is its last step; 0 times NaN is NaN in all steps before.
    assert found.isnan().tolist() == [[False] * 4, [True] * 4]
    assert torch.equal(found[0], ADVANTAGE[0])


def test_no_gradient_flows():
    agent, rollout = agent_and_rollout(custom_env())
    found = RolloutAdvantage(agent)(rollout)
    assert not found["advantage"].requires_grad
    assert not found["value_target"].requires_grad


def test_it_has_no_parameters_of_its_own():
    assert not list(RolloutAdvantage(table()).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.1}, r"gamma and lmbda must lie in \[0, 1\]; got 1.1 and 0.95"),
        ({"lmbda": -0.1}, r"gamma and lmbda must lie in \[0, 1\]; got 0.99 and -0.1"),
        ({"gamma": float("nan")}, r"gamma and lmbda must lie in \[0, 1\]"),
        ({"episode_ends": -1}, "episode_ends must be >= 0, or None; got -1"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutAdvantage(table(), **options)
