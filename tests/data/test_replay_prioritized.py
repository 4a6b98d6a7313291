"""The buffer with priorities: what it draws, its weights, and what is said where TorchRL's extension is missing."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictPrioritizedReplayBuffer
from torchrl.data.replay_buffers.samplers import prioritized
from torchrl.objectives import DQNLoss

from fp8rl_torchrl.data.replay import prioritized_replay_buffer
from fp8rl_torchrl.envs import CartPoleEnv
from fp8rl_torchrl.models.q_network import QNetwork

needs_extension = pytest.mark.skipif(
    prioritized.SumSegmentTreeFp32 is None, reason="TorchRL's compiled extension does not load with this PyTorch"
)

# --- without the extension ---


@pytest.mark.parametrize("name", ["SumSegmentTreeFp32", "MinSegmentTreeFp32"])
def test_a_missing_extension_is_told_with_what_to_do(monkeypatch, name):
    monkeypatch.setattr(prioritized, name, None)
    with pytest.raises(ValueError, match="prioritized replay needs TorchRL's compiled extension") as raised:
        prioritized_replay_buffer(10, 4)
    message = str(raised.value)
    assert torch.__version__ in message
    assert "or replay uniformly" in message
    assert "SegmentTreeFp32 is not available" in message  # the cause
    assert isinstance(raised.value.__cause__, RuntimeError)


@needs_extension
def test_a_mistake_of_ones_own_is_not_taken_for_that():
    with pytest.raises(ValueError, match="alpha") as raised:
        prioritized_replay_buffer(10, 4, alpha=-1.0)
    assert "extension" not in str(raised.value)


# --- with it ---


def numbered(count):
    number = torch.arange(count)
    return TensorDict(number=number, next=TensorDict(square=number**2, batch_size=[count]), batch_size=[count])


def filled(errors, batch_size=1000, **options):
    """A buffer of as many transitions as there are errors, with these."""
    buffer = prioritized_replay_buffer(len(errors), batch_size, **options)
    buffer.extend(numbered(len(errors)))
    batch = buffer[:].clone()
    batch.set("index", torch.arange(len(errors))).set("td_error", torch.tensor(errors))
    buffer.update_tensordict_priority(batch)
    return buffer


@needs_extension
def test_the_buffer_is_torchrls_and_keeps_the_newest():
    buffer = prioritized_replay_buffer(8, 4)
    assert type(buffer) is TensorDictPrioritizedReplayBuffer
    for start in (0, 6):
        buffer.extend(numbered(12)[start : start + 6])
    assert sorted(buffer[:]["number"].tolist()) == list(range(4, 12))
    batch = buffer.sample()
    assert batch.batch_size == (4,)
    assert torch.equal(batch["next", "square"], batch["number"] ** 2)
    assert batch["priority_weight"].shape == (4,)


@needs_extension
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_large_errors_are_drawn_more_often(alpha):
    torch.manual_seed(0)
    errors = [1.0, 2.0, 4.0, 8.0]
    buffer = filled(errors, alpha=alpha, beta=1.0)
    drawn = torch.cat([buffer.sample()["number"] for _ in range(20)])
    expected = torch.tensor(errors) ** alpha / (torch.tensor(errors) ** alpha).sum()
    # The standard deviation of a frequency of 20,000 draws is at most 0.0035: the bound is five of them.
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, expected, rtol=0, atol=0.018)


@needs_extension
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_weights_correct_for_that(beta):
    errors = torch.tensor([1.0, 2.0, 4.0, 8.0])
    batch = filled(errors.tolist(), alpha=0.5, beta=beta).sample()
    # (1 / (4 p))^beta over the largest of them, that of the smallest error: (error / 1)^(-alpha beta).
    expected = errors[batch["number"]] ** (-0.5 * beta)
    torch.testing.assert_close(batch["priority_weight"], expected, rtol=1e-4, atol=1e-5)


@needs_extension
def test_a_new_transition_is_drawn_like_the_one_of_the_largest_error():
    torch.manual_seed(0)
    buffer = filled([1.0, 1.0, 1.0, 9.0], alpha=1.0)
    buffer.extend(numbered(1))  # in the place of the first
    drawn = torch.cat([buffer.sample()["index"] for _ in range(20)])
    expected = torch.tensor([9.0, 1.0, 1.0, 9.0]) / 20
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, expected, rtol=0, atol=0.018)


@needs_extension
@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
def test_a_loss_writes_the_errors_and_uses_the_weights():
    env = CartPoleEnv(num_envs=4, seed=0)
    torch.manual_seed(0)
    agent = QNetwork.for_env(env, (16,))
    buffer = prioritized_replay_buffer(100, 16, beta=1.0)
    buffer.extend(env.rollout(8, agent.policy).detach().reshape(-1))
    loss = DQNLoss(agent.values, loss_function="l2", delay_value=True)
    loss.make_value_estimator(gamma=0.9)
    batch = buffer.sample()
    assert (batch["priority_weight"] == 1).all()  # nothing is known of any
    found = loss(batch)["loss"]
    torch.testing.assert_close(found, batch["td_error"].mean())  # which TorchRL squares
    buffer.update_tensordict_priority(batch)
    batch = buffer.sample()
    assert batch["priority_weight"].unique().numel() > 1
    found = loss(batch)["loss"]
    weight = batch["priority_weight"]
    torch.testing.assert_close(found, (batch["td_error"].squeeze(-1) * weight).sum() / weight.sum())
    assert not torch.isclose(found, batch["td_error"].mean())
