"""`rollout_gap`: by hand on known distributions, and between precisions of one policy."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.distributions import Categorical

from fp8rl_torchrl import ActorCritic, Precision, convert, twin
from fp8rl_torchrl.data import make_collector
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.training.rollout_gap import rollout_gap

FP32 = Precision("fp32")


class Logits(nn.Module):
    """Gives action 0 the probability 0.8."""

    def forward(self, observation):
        return torch.tensor([0.8, 0.2]).log().expand(*observation.shape[:-1], 2)


def policy():
    return ProbabilisticTensorDictSequential(
        TensorDictModule(Logits(), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical, return_log_prob=True),
    )


def test_by_hand():
    # Rollout probabilities 0.5 each; the learner's 0.8 and 0.2. Ratios 1.6 and 0.4, so |r - 1| is at most 0.6, and the
    # mean of r - 1 - log r over one action of each is -(log 1.6 + log 0.4) / 2, which here is KL(0.5, 0.5 || 0.8, 0.2).
    rollout = TensorDict(
        observation=torch.zeros(2, 1), action=torch.tensor([0, 1]), action_log_prob=torch.tensor([0.5, 0.5]).log()
    )
    gap = rollout_gap(policy(), rollout.auto_batch_size_(1), FP32)
    kl = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert gap == pytest.approx({"rollout_kl": kl, "rollout_ratio_error": 0.6}, rel=1e-5)


def test_nothing_to_compare_with():
    rollout = TensorDict(observation=torch.zeros(2, 1), action=torch.zeros(2, dtype=torch.int64), batch_size=[2])
    assert rollout_gap(policy(), rollout, FP32) == {}
    rollout["action_log_prob"] = torch.zeros(2)
    assert rollout_gap(lambda tensordict: tensordict, rollout, FP32) == {}


def collected(learner, rollout):
    """The gap after a collection by a policy in one precision, for a learner in another."""
    torch.manual_seed(0)
    env = CustomEnv(num_envs=16, seed=0)
    agent = ActorCritic.for_env(env, hidden=(64, 64, 64))
    for parameter in agent.parameters():
        parameter.data *= 3  # decided enough for a difference to show
    learner, rollout = Precision(learner), Precision(rollout)
    if learner.fp8_recipe:
        convert(agent, learner)
    collector = make_collector(env, twin(agent.policy, rollout), 256)
    gap = rollout_gap(agent.policy, next(iter(collector)), learner)
    collector.shutdown()
    return gap


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "fp8-rowwise-gw-hp"])
def test_the_same_precision_gives_nearly_the_same_distribution(name):
    # Rows are scaled one by one, so a batch of another size gives the same codes; FP32 sums may differ by rounding.
    assert collected(name, name)["rollout_ratio_error"] < 1e-4


@pytest.mark.parametrize(
    ("learner", "rollout", "least"),
    [("fp8", "fp32", 1e-3), ("fp8", "bf16", 1e-3), ("fp32", "fp8", 1e-3), ("bf16", "fp32", 1e-4)],
)
def test_another_precision_shows(learner, rollout, least):
    gap = collected(learner, rollout)
    assert least < gap["rollout_ratio_error"] < 0.2
    assert 0 < gap["rollout_kl"] < 0.01


def test_one_scale_a_tensor_depends_on_the_batch():
    # The rollout saw 16 rows at a time, the learner all 256 at once: other scales, other codes.
    assert collected("fp8-tensorwise", "fp8-tensorwise")["rollout_ratio_error"] > 1e-3
