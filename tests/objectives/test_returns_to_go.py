"""`ReturnsToGo`: by hand, against a loop, with steps that have no return yet, with a baseline, normalised."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import Table
from tensordict import TensorDict
from torchrl.objectives import ReinforceLoss
from whole_rollouts import agent_and_rollout, cartpole, custom_env

from fp8rl_torchrl.objectives.returns_to_go import ReturnsToGo

# Two environments, four steps; gamma = 1/2. The observation is the step's number; V is 1 2 3 4 in the first one, and
# 5 6 7 8 in the second.
#   rewards 1 3 -1 0, terminated at step 1, never after:  1 + 3/2, 3, and two steps without a return
#   rewards 1 0 2 1, truncated at 0, both at 1, truncated at 3:  1, 0, 2 + 1/2, 1
REWARD = [[1.0, 3.0, -1.0, 0.0], [1.0, 0.0, 2.0, 1.0]]
DONE = [[False, True, False, False], [True, True, False, True]]
RETURNS = [[2.5, 3.0, 0.0, 0.0], [1.0, 0.0, 2.5, 1.0]]
KNOWN = [[True, True, False, False], [True, True, True, True]]
VALUES = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


def rollout(reward, done):
    reward, done = torch.as_tensor(reward), torch.as_tensor(done)
    number = torch.arange(reward.numel()).reshape(reward.shape)
    after = TensorDict(reward=reward.unsqueeze(-1), done=done.unsqueeze(-1), batch_size=reward.shape)
    return TensorDict(observation=number, next=after, batch_size=reward.shape)


def table(values=VALUES):
    values = torch.as_tensor(values).flatten()
    return Table(torch.zeros(len(values), 2), values)


def written(data, values=VALUES, **options):
    """What is written into a rollout: advantages and targets ``[N, T]``."""
    returns = ReturnsToGo(table(values), **{"gamma": 0.5, "normalize": False} | options)
    found = returns(data)
    assert found is data
    for key in ("advantage", "value_target"):
        assert (found[key].shape, found[key].dtype) == ((*data.shape, 1), torch.float32)
        assert not found[key].requires_grad
    return found["advantage"].squeeze(-1), found["value_target"].squeeze(-1)


# --- by hand ---


def test_returns_by_hand():
    advantage, target = written(rollout(REWARD, DONE))
    assert target.tolist() == RETURNS
    # Two of eight steps have no return: the others count 8 / 6.
    torch.testing.assert_close(advantage, torch.tensor(RETURNS) * 8 / 6)


def test_a_baseline_is_taken_off():
    advantage, target = written(rollout(REWARD, DONE), baseline=True)
    # The target of a step without a return is its value, so that the critic learns nothing there.
    assert target.tolist() == [[2.5, 3.0, 3.0, 4.0], [1.0, 0.0, 2.5, 1.0]]
    expected = torch.tensor([[1.5, 1.0, 0.0, 0.0], [-4.0, -6.0, -4.5, -7.0]])
    torch.testing.assert_close(advantage, expected * 8 / 6)


@pytest.mark.parametrize("baseline", [False, True])
def test_normalised_by_hand(baseline):
    advantage, target = written(rollout(REWARD, DONE), normalize=True, baseline=baseline)
    known = [1.5, 1.0, -4.0, -6.0, -4.5, -7.0] if baseline else [2.5, 3.0, 1.0, 0.0, 2.5, 1.0]
    mean = sum(known) / 6
    deviation = math.sqrt(sum((each - mean) ** 2 for each in known) / 6)
    normal = torch.zeros(2, 4)
    normal[torch.tensor(KNOWN)] = torch.tensor([(each - mean) / deviation for each in known])
    torch.testing.assert_close(advantage, normal * 8 / 6, rtol=1e-5, atol=1e-6)
    assert torch.equal(target, written(rollout(REWARD, DONE), baseline=baseline)[1])
    # The mean over all steps of a product is the mean over those that have a return.
    weight = torch.arange(8.0).reshape(2, 4)
    by_mask = (normal * weight).sum() / 6
    torch.testing.assert_close((advantage * weight).mean(), by_mask, rtol=1e-5, atol=1e-6)
    assert advantage.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantage.square().sum().item() / 6 == pytest.approx((8 / 6) ** 2, rel=1e-5)


def test_counting_steps_without_a_return_would_give_other_numbers():
    """Negative twin: their rewards so far are no returns."""
    so_far = torch.tensor([[2.5, 3.0, -1.0, 0.0], [1.0, 0.0, 2.5, 1.0]])
    normal = (so_far - so_far.mean()) / so_far.std(correction=0)
    advantage, _ = written(rollout(REWARD, DONE), normalize=True)
    assert not torch.allclose(advantage, normal, atol=0.1)


def test_without_any_end_nothing_is_learned():
    data = rollout(REWARD, [[False] * 4] * 2)
    for normalize in (False, True):
        advantage, target = written(data, normalize=normalize, baseline=True)
        assert not advantage.any()
        assert target.tolist() == VALUES


def test_equal_returns_are_normalised_to_zero():
    advantage, target = written(rollout([[2.0, 2.0], [2.0, 2.0]], [[True, True]] * 2), VALUES, normalize=True)
    assert not advantage.any()
    assert target.tolist() == [[2.0, 2.0]] * 2


def test_a_rollout_of_one_environment():
    for row in range(2):
        data = rollout(REWARD[row], DONE[row])
        advantage, target = written(data, VALUES[row], baseline=True)
        whole, whole_target = written(rollout([REWARD[row]], [DONE[row]]), VALUES[row], baseline=True)
        assert torch.equal(advantage, whole[0])
        assert torch.equal(target, whole_target[0])


def test_a_reward_after_an_end_belongs_to_the_next_episode():
    data = rollout(REWARD, DONE)
    data["next", "reward"][0, 2:] = 1e6
    assert torch.equal(written(data)[1], written(rollout(REWARD, DONE))[1])


# --- any rollout ---


def brute_force(reward, done, gamma):
    """The return of each step, or None."""
    returns = []
    for row, ends in zip(reward, done, strict=True):
        for start in range(len(row)):
            total, found = 0.0, None
            for step in range(start, len(row)):
                total += gamma ** (step - start) * row[step]
                if ends[step]:
                    found = total
                    break
            returns.append(found)
    return returns


@settings(max_examples=150, deadline=None)
@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 12)).flatmap(
        lambda shape: st.lists(
            st.lists(
                st.tuples(st.floats(-10, 10, width=32), st.booleans(), st.floats(-10, 10, width=32)),
                min_size=shape[1],
                max_size=shape[1],
            ),
            min_size=shape[0],
            max_size=shape[0],
        )
    ),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    baseline=st.booleans(),
)
def test_any_rollout_equals_a_loop(rows, gamma, baseline):
    reward, done, values = ([[step[place] for step in row] for row in rows] for place in range(3))
    advantage, target = written(rollout(reward, done), values, gamma=gamma, baseline=baseline)
    returns = brute_force(reward, done, gamma)
    known = sum(each is not None for each in returns)
    taken_off = [value if baseline else 0.0 for row in values for value in row]
    pairs = list(zip(returns, taken_off, strict=True))
    expected = [0.0 if each is None else (each - value) * len(returns) / known for each, value in pairs]
    torch.testing.assert_close(advantage.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-3)
    expected = [value if each is None else each for each, value in pairs]
    torch.testing.assert_close(target.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("env", [custom_env, cartpole])
def test_whole_episodes_of_an_environment(env):
    agent, data = agent_and_rollout(env(), shared=False)
    found = ReturnsToGo(agent, gamma=1.0, normalize=False)(data.clone())
    # Undiscounted, the return to go and the rewards before it are the whole episode's.
    before = data["episode_reward"]
    for row in range(len(data)):
        ends = data["next", "done"][row, :, 0].nonzero().flatten().tolist()
        for start, end in zip([0, *(each + 1 for each in ends)], ends, strict=False):
            whole = data["next", "episode_reward"][row, end]
            some = found["value_target"][row, start : end + 1] + before[row, start : end + 1]
            torch.testing.assert_close(some, whole.expand_as(some), rtol=1e-5, atol=1e-4)


# --- with a model and a loss ---


@pytest.mark.parametrize("num_envs", [4, None])
def test_the_baseline_is_the_models_value(num_envs):
    agent, data = agent_and_rollout(custom_env(num_envs), shared=False)
    raw = ReturnsToGo(agent, normalize=False)(data.clone())
    found = ReturnsToGo(agent, normalize=False, baseline=True)(data.clone())
    value = agent.state_value(data)
    known = raw["advantage"] != 0
    share = data.numel() / known.sum()
    assert 0.5 * data.numel() < known.sum() < data.numel()
    torch.testing.assert_close(raw["advantage"] - found["advantage"], value.detach() * known * share)


def test_torchrls_loss_learns_from_known_returns_alone():
    agent, data = agent_and_rollout(custom_env(), shared=False)
    batch = ReturnsToGo(agent, gamma=0.9)(data.clone()).reshape(-1)
    loss = ReinforceLoss(agent.policy, agent.value, loss_critic_type="l2")
    found = loss(batch)["loss_actor"]
    known = batch["advantage"].squeeze(-1) != 0
    advantage = batch["advantage"].squeeze(-1)[known] * known.sum() / len(known)
    expected = -(advantage * agent.policy.get_dist(batch).log_prob(batch["action"])[known]).mean()
    torch.testing.assert_close(found, expected)


def test_it_owns_no_parameters_and_names_what_it_reads():
    agent, data = agent_and_rollout(custom_env())
    returns = ReturnsToGo(agent, baseline=True)
    assert not list(returns.parameters())
    assert set(returns.in_keys) == {"observation", ("next", "reward"), ("next", "done")}
    whole, selected = returns(data.clone()), returns(data.select(*returns.in_keys))
    for key in ("advantage", "value_target"):
        assert torch.equal(whole[key], selected[key])
    for missing in (("next", "reward"), ("next", "done")):
        with pytest.raises(KeyError, match=f'"{missing[-1]}" not found'):
            returns(data.exclude(missing))


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_a_discount_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        ReturnsToGo(table(), gamma=gamma)
