"""`n_step`: by hand, against a loop, and what TorchRL's estimators make of its transitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import MultiStep
from torchrl.objectives.value import TD0Estimator

from fp8rl_torchrl.data.fused import FusedCollector
from fp8rl_torchrl.data.multi_step import n_step
from fp8rl_torchrl.envs import CartPoleEnv


def rollout(reward, terminated, truncated=None):
    """A rollout ``[N, T]`` whose observations number its steps; the next one has the number plus one half."""
    reward, terminated = torch.as_tensor(reward, dtype=torch.float32), torch.as_tensor(terminated)
    truncated = torch.zeros_like(terminated) if truncated is None else torch.as_tensor(truncated)
    number = torch.arange(reward.numel(), dtype=torch.float32).reshape(reward.shape)
    after = {"observation": number + 0.5, "reward": reward, "terminated": terminated, "truncated": truncated}
    after["done"] = terminated | truncated
    columns = {key: entry.unsqueeze(-1) for key, entry in after.items()}
    entries = {"observation": number.unsqueeze(-1), "next": TensorDict(columns, batch_size=reward.shape)}
    return TensorDict(entries, batch_size=reward.shape)


def by_multi_step(data, steps, gamma):
    """TorchRL's own."""
    return MultiStep(gamma, steps)(data.clone())


# --- by hand ---

# Two environments of five steps; gamma 1/2, three steps.
#   rewards 1 2 4 8 16, terminated at step 2:  1 + 1 + 1, 2 + 2, 4 | 8 + 8, 16
#   rewards 2 2 2 2  2, truncated at step 0:   2 | 2 + 1 + 1/2, the same, 2 + 1, 2
REWARD = [[1.0, 2.0, 4.0, 8.0, 16.0], [2.0, 2.0, 2.0, 2.0, 2.0]]
TERMINATED = [[False, False, True, False, False], [False] * 5]
TRUNCATED = [[False] * 5, [True, False, False, False, False]]
RETURNS = [[3.0, 4.0, 4.0, 16.0, 16.0], [2.0, 3.5, 3.5, 3.0, 2.0]]
STEPS = [[3, 2, 1, 2, 1], [1, 3, 3, 2, 1]]
LAST = [[2, 2, 2, 4, 4], [5, 8, 9, 9, 9]]
"""The numbers of the last steps that are spanned."""


def by_hand():
    return rollout(REWARD, TERMINATED, TRUNCATED)


def assert_as_by_hand(spanned):
    following = spanned["next"]
    last = torch.tensor(LAST)
    assert following["reward"].squeeze(-1).tolist() == RETURNS
    assert spanned["steps_to_next_obs"].squeeze(-1).tolist() == STEPS
    assert torch.equal(following["observation"].squeeze(-1), last + 0.5)
    for key, flags in (("terminated", TERMINATED), ("truncated", TRUNCATED)):
        assert torch.equal(following[key].squeeze(-1), torch.tensor(flags).flatten()[last]), key
    assert torch.equal(following["done"], following["terminated"] | following["truncated"])


def test_three_steps_by_hand():
    assert_as_by_hand(n_step(by_hand(), 3, 0.5))


def test_torchrls_own_leaves_the_flags_of_the_first_step():
    """Negative twin: step 0 then leads to the end of an episode without saying so."""
    theirs = by_multi_step(by_hand(), 3, 0.5)
    assert theirs["next", "reward"].squeeze(-1).tolist() == RETURNS
    assert theirs["steps_to_next_obs"].squeeze(-1).tolist() == STEPS
    with pytest.raises(AssertionError, match="terminated"):
        assert_as_by_hand(theirs)


def test_the_keys_shapes_and_dtypes():
    data = by_hand()
    spanned = n_step(data, 3, 0.5)
    assert set(spanned.keys(True, True)) == set(data.keys(True, True)) | {"steps_to_next_obs"}
    assert spanned["steps_to_next_obs"].dtype == torch.int64
    for key in data.keys(True, True):
        assert (spanned[key].shape, spanned[key].dtype) == (data[key].shape, data[key].dtype), key
    assert torch.equal(spanned["observation"], data["observation"])


def test_the_rollout_is_not_changed():
    data = by_hand()
    before = data.clone()
    n_step(data, 3, 0.5)
    assert set(data.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(data[key], before[key]) for key in before.keys(True, True))


def test_one_step_changes_nothing():
    data = by_hand()
    spanned = n_step(data, 1, 0.5)
    assert (spanned["steps_to_next_obs"] == 1).all()
    assert all(torch.equal(spanned[key], data[key]) for key in data.keys(True, True))


def test_a_rollout_of_one_environment():
    data = by_hand()
    for row in range(2):
        one, whole = n_step(data[row].refine_names("time"), 3, 0.5), n_step(data, 3, 0.5)[row]
        assert all(torch.equal(one[key], whole[key]) for key in whole.keys(True, True))


def test_a_flattened_rollout_is_refused():
    collector = FusedCollector(CartPoleEnv(4, seed=0), frames_per_batch=16, compile=False)
    data = next(iter(collector))
    for flat in (data.reshape(-1), by_hand().flatten()):
        with pytest.raises(
            ValueError, match=r"needs a rollout \[N, T\].* flat \(1[06] steps\): call it before reshape"
        ):
            n_step(flat, 3, 0.5)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be >= 1; got {steps}"):
        n_step(by_hand(), steps, 0.5)


def test_a_reward_behind_an_end_is_not_read():
    data = by_hand()
    data["next", "reward"][0, 3] = float("nan")
    found = n_step(data, 3, 0.5)["next", "reward"][0].squeeze(-1)
    assert found.isnan().tolist() == [False, False, False, True, False]


# --- any rollout ---


def brute_force(data, steps, gamma):
    """Row by row, step by step: returns, numbers of steps, and the places of the last ones."""
    following = data["next"]
    returns, lengths, last = [], [], []
    for reward, done in zip(following["reward"].squeeze(-1), following["done"].squeeze(-1), strict=True):
        for start in range(len(reward)):
            total, end = 0.0, start
            for ahead in range(steps):
                end = start + ahead
                total += gamma**ahead * reward[end].item()
                if done[end] or end == len(reward) - 1:
                    break
            returns.append(total)
            lengths.append(end - start + 1)
            last.append(end)
    return (torch.tensor(entry).reshape(data.shape) for entry in (returns, lengths, last))


def assert_equals_brute_force(spanned, data, steps, gamma):
    returns, lengths, last = brute_force(data, steps, gamma)
    torch.testing.assert_close(spanned["next", "reward"].squeeze(-1), returns.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(spanned["steps_to_next_obs"].squeeze(-1), lengths)
    for key in ("observation", "terminated", "truncated", "done"):
        assert torch.equal(spanned["next", key], data["next", key][torch.arange(len(last)).unsqueeze(-1), last]), key


ROLLOUTS = st.tuples(st.integers(1, 3), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(
            st.tuples(st.floats(-10, 10, width=32), st.sampled_from([0, 0, 0, 1, 2, 3])),
            min_size=shape[1],
            max_size=shape[1],
        ),
        min_size=shape[0],
        max_size=shape[0],
    )
)
"""Rewards, and how each step ends: not, terminated, truncated, both."""


@settings(max_examples=150, deadline=None)
@given(rows=ROLLOUTS, steps=st.integers(1, 15), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_any_rollout_equals_a_loop(rows, steps, gamma):
    reward, ends = torch.tensor(rows, dtype=torch.float32).unbind(-1)
    ends = ends.long()
    data = rollout(reward, (ends & 1).bool(), (ends & 2).bool())
    assert_equals_brute_force(n_step(data, steps, gamma), data, steps, gamma)


def test_a_collection():
    torch.manual_seed(0)
    collector = FusedCollector(CartPoleEnv(4, seed=0), frames_per_batch=4 * 60, compile=False)  # time-major in memory
    data = next(iter(collector))
    assert data["next", "done"].any(1).all()
    spanned = n_step(data, 5, 0.9)
    assert_equals_brute_force(spanned, data, 5, 0.9)
    # Of an environment's own counters, those after the last step.
    advance = spanned["next", "step_count"] - data["step_count"]
    assert torch.equal(advance, spanned["steps_to_next_obs"])
    with pytest.raises(AssertionError):
        assert_equals_brute_force(by_multi_step(data, 5, 0.9), data, 5, 0.9)


# --- targets ---


class Tenfold(nn.Module):
    """A value of ten times the observation's number."""

    def forward(self, observation):
        return 10 * observation


def targets(spanned, gamma):
    value = TensorDictModule(Tenfold(), ["observation"], ["state_value"])
    return TD0Estimator(gamma=gamma, value_network=value).value_estimate(spanned).squeeze(-1)


def test_torchrls_estimator_gives_the_n_step_target():
    # R + (1/2)^m * 10 * (the last step's number + 1/2), and R alone where the last one terminated.
    expected = [
        [3.0, 4.0, 4.0, 16 + 45 / 4, 16 + 45 / 2],
        [2 + 55 / 2, 3.5 + 85 / 8, 3.5 + 95 / 8, 3 + 95 / 4, 2 + 95 / 2],
    ]
    assert targets(n_step(by_hand(), 3, 0.5), 0.5).tolist() == expected
    # Negative twins: the same without the number of steps, and from TorchRL's own transitions.
    assert targets(n_step(by_hand(), 3, 0.5).exclude("steps_to_next_obs"), 0.5).tolist() != expected
    theirs = targets(by_multi_step(by_hand(), 3, 0.5), 0.5)
    assert theirs[0, 0] == 3 + 25 / 8  # a value after the termination
    assert theirs.tolist() != expected
