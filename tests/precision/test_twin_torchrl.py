"""`twin` inside TorchRL: keys, specs, distributions, collectors and advantage estimators."""

import pytest
import torch
from converted_models import BATCH, MODELS, observations, tensordict
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from torch import nn
from torchrl.collectors import Collector
from torchrl.objectives.value import GAE

import fp8rl_torchrl as f8
from fp8rl_torchrl.precision import Float8Linear, Precision, Twin
from fp8rl_torchrl.precision.convert import convert
from fp8rl_torchrl.precision.twin import twin


def agent(name="agent"):
    torch.manual_seed(0)
    return MODELS[name].build()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_methods_run_in_its_precision_too(precision):
    policy = agent().policy
    low, seen = twin(policy, precision), []
    for layer in low.modules():
        if type(layer) in (nn.Linear, Float8Linear):
            layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    data = low(tensordict().detach())
    results = [low.get_dist(data.copy()).logits, low.get_dist_params(data.copy())["logits"]]
    log_prob = low.log_prob(data.copy())
    assert seen == [torch.bfloat16] * 8  # two layers, four calls
    assert torch.equal(log_prob, data["action_log_prob"])
    assert all(torch.allclose(each.log_softmax(-1), data["logits"].log_softmax(-1)) for each in results)
    assert not torch.equal(log_prob, policy.log_prob(data.copy()))


def test_keys_specs_and_other_attributes():
    policy = agent("agent-continuous").policy
    low = twin(policy, "bf16")
    assert isinstance(low, Twin)
    assert isinstance(low, TensorDictModuleBase)
    assert (low.in_keys, low.out_keys) == (policy.in_keys, policy.out_keys)
    assert low.spec == policy.spec
    assert low.default_interaction_type is InteractionType.RANDOM
    assert low.log_prob_keys == policy.log_prob_keys
    assert low.precision == Precision("bf16")
    with pytest.raises(AttributeError, match="banana"):
        _ = low.banana
    value = twin(agent().value, "bf16")
    assert not hasattr(value, "get_dist")
    assert value(tensordict())["state_value"].dtype == torch.float32  # heads are FP32


def test_called_with_tensors():
    agent_ = agent()
    low, x = twin(agent_.value, "bf16"), observations().detach()
    assert torch.equal(low(observation=x)[-1], low(tensordict().detach())["state_value"])


def test_exploration_is_decided_outside():
    low = twin(agent().policy, "fp8")
    with set_interaction_type(InteractionType.DETERMINISTIC):
        first, second = low(tensordict().detach()), low(tensordict().detach())
    assert torch.equal(first["action"], first["logits"].argmax(-1))
    assert torch.equal(first["action"], second["action"])


@pytest.mark.parametrize("rollout", ["fp32", "bf16", "fp8", "fp8-tensorwise"])
@pytest.mark.parametrize("learner", ["fp32", "fp8"])
def test_as_the_policy_of_a_collector(rollout, learner):
    env = f8.envs.CustomEnv(num_envs=4, seed=0)
    torch.manual_seed(0)
    agent = f8.ActorCritic.for_env(env, hidden=(64, 64))
    if learner == "fp8":
        convert(agent, "fp8")
    low = twin(agent.policy, rollout)
    collector = Collector(env, low, frames_per_batch=32, total_frames=64, auto_register_policy_transforms=False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.1)
    batches = 0
    for batch in collector:
        # One step at a time, as the collector called it.
        stored = torch.stack([low.get_dist(step).log_prob(step["action"]) for step in batch.unbind(1)], 1)
        assert torch.equal(batch["action_log_prob"], stored)
        again = torch.stack([agent.policy.get_dist(step).log_prob(step["action"]) for step in batch.unbind(1)], 1)
        assert torch.equal(stored, again) == (rollout == learner == "fp32")
        assert (stored - again).abs().max() < 0.05
        batches += 1
        before = low(batch[0, :1].select("observation"))["logits"].detach().clone()
        agent.joint(batch)["logits"].square().mean().backward()
        optimizer.step()
        assert not torch.equal(low(batch[0, :1].select("observation"))["logits"], before)
    collector.shutdown()
    assert batches == 2


def test_as_the_value_network_of_an_advantage_estimator():
    agent_ = agent()
    rows = tensordict().detach()[None]
    done = torch.zeros(1, BATCH, 1, dtype=torch.bool)
    following = {"observation": rows["observation"], "reward": done.float(), "done": done, "terminated": done}
    rows["next"] = following
    results = [
        GAE(gamma=0.9, lmbda=0.9, value_network=network)(rows.copy())["advantage"]
        for network in (agent_.value, twin(agent_.value, "fp8"))
    ]
    assert 0 < (results[0] - results[1]).abs().max() < 0.1
