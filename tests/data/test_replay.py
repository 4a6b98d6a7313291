"""The buffers: nothing is changed on the way, the oldest goes first, a pass draws everything once."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from fp8rl_torchrl.data.packed import PackedReplayBuffer
from fp8rl_torchrl.data.replay import replay_buffer, rollout_buffer
from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.models.actor_critic import ActorCritic


def numbered(*numbers):
    """Transitions that can be told apart."""
    number = torch.tensor(numbers)
    return TensorDict(
        number=number, next=TensorDict(square=number**2, batch_size=len(numbers)), batch_size=len(numbers)
    )


def test_the_defaults():
    buffer = replay_buffer()
    assert type(buffer) is PackedReplayBuffer
    assert isinstance(buffer, TensorDictReplayBuffer)
    assert buffer.storage.max_size == 10_000
    buffer.extend(numbered(*range(100)))
    assert buffer.sample().batch_size == (64,)


def test_transitions_arrive_unchanged():
    env = CustomEnv(num_envs=4, seed=0)
    torch.manual_seed(0)
    rollout = env.rollout(40, ActorCritic.for_env(env).policy, break_when_any_done=False).detach().reshape(-1)
    buffer = replay_buffer(1000, 64)
    buffer.extend(rollout)
    assert len(buffer) == 160
    stored = buffer[:]
    for key in rollout.keys(True, True):
        assert torch.equal(stored[key], rollout[key]), key
        assert stored[key].dtype == rollout[key].dtype
    # A sample is made of whole transitions: each equals the one that its index names.
    sample = buffer.sample()
    for key in rollout.keys(True, True):
        assert torch.equal(sample[key], rollout[key][sample["index"]]), key


def test_a_sample_is_a_copy():
    buffer = replay_buffer(10, 4)
    buffer.extend(numbered(*range(10)))
    buffer.sample()["number"].fill_(-1)
    assert buffer[:]["number"].tolist() == list(range(10))


def test_what_is_stored_is_a_copy():
    transitions = numbered(1, 2, 3)
    buffer = replay_buffer(10, 4)
    buffer.extend(transitions)
    transitions["number"].fill_(-1)
    assert buffer[:]["number"].tolist() == [1, 2, 3]


def test_the_oldest_are_dropped():
    buffer = replay_buffer(10, 4)
    buffer.extend(numbered(*range(7)))
    assert len(buffer) == 7
    buffer.extend(numbered(*range(7, 14)))
    assert len(buffer) == 10
    assert sorted(buffer[:]["number"].tolist()) == list(range(4, 14))
    assert torch.equal(buffer[:]["next", "square"], buffer[:]["number"] ** 2)


def test_fewer_transitions_than_a_batch_are_drawn_repeatedly():
    buffer = replay_buffer(100, 64)
    buffer.extend(numbered(3, 5))
    sample = buffer.sample()
    assert sample.batch_size == (64,)
    assert set(sample["number"].tolist()) == {3, 5}


def test_samples_are_uniform():
    torch.manual_seed(0)
    buffer = replay_buffer(50, 1000)
    buffer.extend(numbered(*range(50)))
    drawn = torch.cat([buffer.sample()["number"] for _ in range(20)])
    counts = torch.bincount(drawn, minlength=50)
    # 20,000 draws over 50: 400 each; the chi-square statistic of 49 degrees of freedom exceeds 85.4 once in 1,000.
    assert ((counts - 400.0) ** 2 / 400).sum() < 85.4


def test_samples_follow_the_global_seed():
    buffer = replay_buffer(50, 16)
    buffer.extend(numbered(*range(50)))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(buffer.sample()["number"].tolist())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("batch_size", [10, 20, 60])
def test_a_pass_over_the_rollout_buffer_draws_every_transition_once(batch_size):
    torch.manual_seed(0)
    buffer = rollout_buffer(60, batch_size)
    buffer.extend(numbered(*range(60)))
    orders = []
    for _ in range(3):
        batches = [batch["number"].tolist() for batch in buffer]
        assert [len(batch) for batch in batches] == [batch_size] * (60 // batch_size)
        orders.append([number for batch in batches for number in batch])
        assert sorted(orders[-1]) == list(range(60))
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_pass_by_samples_draws_every_transition_once():
    buffer = rollout_buffer(60, 20)
    for start in (0, 60, 120):  # collection after collection
        buffer.extend(numbered(*range(start, start + 60)))
        for _ in range(2):
            drawn = torch.cat([buffer.sample()["number"] for _ in range(3)])
            assert sorted(drawn.tolist()) == list(range(start, start + 60))


def test_a_replay_buffer_would_not():
    torch.manual_seed(0)
    buffer = replay_buffer(60, 20)
    buffer.extend(numbered(*range(60)))
    drawn = torch.cat([buffer.sample()["number"] for _ in range(3)])
    assert sorted(drawn.tolist()) != list(range(60))


def test_a_minibatch_that_does_not_divide_the_collection_is_refused():
    with pytest.raises(ValueError, match="batch_size must divide the 60 frames of a collection; got 16"):
        rollout_buffer(60, 16)
