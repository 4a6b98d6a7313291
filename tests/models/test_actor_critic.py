"""`ActorCritic`: keys, shapes and dtypes, how often the encoder runs, precision and parameters."""

import copy
import math

import pytest
import torch
from actor_critics import VECTOR, Specs, batch, encoders
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fp8rl_torchrl.models.actor_critic import ActorCritic

LOW = [torch.bfloat16, torch.float16]


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- what the operators write ---


@pytest.mark.parametrize("shape", [(), (5,), (5, 3)])
def test_keys_shapes_and_dtypes(agent, shape):
    written = {
        "policy": {
            "logits": ((2,), torch.float32),
            "action": ((), torch.int64),
            "action_log_prob": ((), torch.float32),
        },
        "value": {"state_value": ((1,), torch.float32)},
    }
    written["joint"] = written["policy"] | written["value"]
    for operator, entries in written.items():
        output = getattr(agent, operator)(batch(*shape))
        assert output.batch_size == shape
        public = {key for key in output.keys() if not key.startswith("_")}
        assert public == {"observation"} | set(entries)
        for key, (extra, dtype) in entries.items():
            assert (output[key].shape, output[key].dtype) == (shape + extra, dtype), (operator, key)


def test_continuous_keys_shapes_and_dtypes():
    agent = ActorCritic.for_env(Specs(VECTOR, Bounded(-2, 2, (2,))))
    output = agent.joint(batch(5, size=3))
    for key, shape in {"loc": (5, 2), "scale": (5, 2), "action": (5, 2), "action_log_prob": (5,)}.items():
        assert (output[key].shape, output[key].dtype) == (shape, torch.float32)


def test_each_operator_reads_the_observation_alone(agent):
    for operator in (agent.policy, agent.value, agent.joint):
        assert operator.in_keys == ["observation"]


def test_the_operators_agree(agent):
    torch.manual_seed(3)
    policy = agent.policy(batch(6))
    torch.manual_seed(3)
    joint = agent.joint(batch(6))
    for key in ("logits", "action", "action_log_prob"):
        assert torch.equal(policy[key], joint[key])
    assert torch.equal(agent.value(batch(6))["state_value"], joint["state_value"])


def test_distribution_and_value_equal_the_operators(agent):
    data = batch(6)
    distribution, value = agent.distribution_and_value(data)
    joint = agent.joint(data.clone())
    assert torch.equal(value, joint["state_value"])
    assert torch.equal(distribution.log_prob(joint["action"]), joint["action_log_prob"])
    assert distribution.batch_shape == (6,)
    assert torch.equal(agent.state_value(data), value)
    assert list(data.keys()) == ["observation"]  # nothing was written


def test_distribution_and_value_equal_the_operators_for_continuous_actions():
    torch.manual_seed(0)
    agent = ActorCritic.for_env(Specs(VECTOR, Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))))
    data = batch(6, size=3)
    distribution, value = agent.distribution_and_value(data)
    joint = agent.joint(data.clone())
    assert torch.equal(value, joint["state_value"])
    torch.testing.assert_close(distribution.log_prob(joint["action"]), joint["action_log_prob"])
    reference = agent.policy.get_dist(data.clone())
    assert torch.equal(distribution.deterministic_sample, reference.deterministic_sample)


def test_the_stored_log_prob_is_that_of_the_stored_action(agent):
    output = agent.policy(batch(64))
    by_hand = output["logits"].log_softmax(-1).gather(-1, output["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(output["action_log_prob"], by_hand)
    assert output["action"].unique().tolist() == [0, 1]


def test_the_continuous_log_prob_is_that_of_a_tanh_normal():
    # a = 2 tanh(u), u ~ N(loc, scale): log p(a) = log N(u; loc, scale) - log 2 - log(1 - tanh(u)^2).
    torch.manual_seed(0)
    output = ActorCritic.for_env(Specs(VECTOR, Bounded(-2, 2, (1,)))).policy(batch(64, size=3))
    squashed, loc, scale = (output[key].double().squeeze(-1) for key in ("action", "loc", "scale"))
    u = torch.atanh(squashed / 2)
    normal = -0.5 * ((u - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    by_hand = normal - math.log(2) - torch.log1p(-((squashed / 2) ** 2))
    torch.testing.assert_close(output["action_log_prob"].double(), by_hand, rtol=0, atol=1e-4)


def test_samples_follow_the_distribution_and_the_mode_is_its_maximum(agent):
    data = TensorDict(observation=torch.tensor([0.3, -0.2]).expand(20_000, 2), batch_size=[20_000])
    torch.manual_seed(0)
    output = agent.policy(data.clone())
    probability = output["logits"][0].softmax(-1)[1].item()
    assert 0.02 < probability < 0.98
    # The standard deviation of a frequency of 20,000 draws is at most 0.0035.
    assert output["action"].float().mean().item() == pytest.approx(probability, abs=0.015)
    for exploration in (ExplorationType.DETERMINISTIC, ExplorationType.MODE):
        with set_exploration_type(exploration):
            action = agent.policy(data.clone())["action"]
        assert action.unique().tolist() == [int(probability > 0.5)]
    with set_exploration_type(ExplorationType.RANDOM):
        assert agent.policy(data.clone())["action"].unique().tolist() == [0, 1]


def test_a_new_policy_is_nearly_uniform(env):
    # The gain of its last layer is 0.01.
    probabilities = ActorCritic.for_env(env).policy(batch(64))["logits"].softmax(-1)
    assert (probabilities - 0.5).abs().max() < 0.01


# --- how often the encoder runs ---


def test_a_shared_encoder_runs_once(env):
    agent = ActorCritic.for_env(env)
    calls = count_calls(*encoders(agent))
    for run in (agent.joint, agent.policy, agent.value, agent.distribution_and_value, agent.state_value):
        calls.clear()
        run(batch(4))
        assert len(calls) == 1, run


def test_separate_encoders_run_once_each(env):
    agent = ActorCritic.for_env(env, shared=False)
    actor, critic = (count_calls(encoder) for encoder in encoders(agent))
    expected = {
        "joint": (1, 1),
        "policy": (1, 0),
        "value": (0, 1),
        "distribution_and_value": (1, 1),
        "state_value": (0, 1),
    }
    for name, times in expected.items():
        actor.clear()
        critic.clear()
        getattr(agent, name)(batch(4))
        assert (len(actor), len(critic)) == times, name


# --- precision ---


@pytest.mark.parametrize("dtype", LOW)
def test_the_heads_compute_in_fp32_under_autocast(agent, dtype):
    data = batch(32)
    with torch.autocast("cpu", dtype=dtype):
        joint = agent.joint(data.clone())
        distribution, value = agent.distribution_and_value(data)
        features = [encoder(data["observation"]) for encoder in encoders(agent)]
    assert {feature.dtype for feature in features} == {dtype}
    _, actor_head, _, critic_head = agent._parts
    expected_logits = nn.functional.linear(features[0].float(), actor_head.module.weight, actor_head.module.bias)
    expected_value = nn.functional.linear(features[-1].float(), critic_head.module.weight, critic_head.module.bias)
    assert joint["logits"].dtype == joint["state_value"].dtype == joint["action_log_prob"].dtype == torch.float32
    assert torch.equal(joint["logits"], expected_logits)
    assert torch.equal(joint["state_value"], expected_value)
    assert torch.equal(value, expected_value)
    log_prob = expected_logits.log_softmax(-1).gather(-1, joint["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(distribution.log_prob(joint["action"]), log_prob)
    # It matters: the encoder did run in the low format.
    assert not torch.equal(agent.joint(data.clone())["logits"], joint["logits"])


@pytest.mark.parametrize("dtype", LOW)
def test_the_continuous_head_computes_in_fp32_under_autocast(dtype):
    agent = ActorCritic.for_env(Specs(VECTOR, Bounded(-2, 2, (2,))))
    with torch.autocast("cpu", dtype=dtype):
        output = agent.joint(batch(8, size=3))
        distribution, _ = agent.distribution_and_value(batch(8, size=3))
    for key in ("loc", "scale", "action", "action_log_prob", "state_value"):
        assert output[key].dtype == torch.float32
    assert distribution.log_prob(output["action"]).dtype == torch.float32


# --- parameters ---


def test_every_parameter_has_one_name(agent):
    state = agent.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers)
    assert set(state) == {name for name, _ in agent.named_parameters(remove_duplicate=False)}
    # By hand: the encoder has 2 * 16 + 16 + 16 * 16 + 16 = 320, the heads 16 * 2 + 2 and 16 + 1.
    assert sum(parameter.numel() for parameter in agent.parameters()) == (1 if agent.shared else 2) * 320 + 34 + 17


def test_the_operators_use_the_agents_own_parameters(agent):
    own = {id(parameter) for parameter in agent.parameters()}
    for operator in (agent.policy, agent.value, agent.joint):
        assert {id(parameter) for parameter in operator.parameters()} <= own
    assert {id(p) for operator in (agent.policy, agent.value) for p in operator.parameters()} == own


def test_a_state_dict_restores_the_agent(env, agent):
    other = ActorCritic.for_env(env, hidden=(16, 16), shared=agent.shared)
    assert not torch.equal(other.value(batch(4))["state_value"], agent.value(batch(4))["state_value"])
    other.load_state_dict(agent.state_dict())
    for ours, theirs in zip(
        other.distribution_and_value(batch(4)), agent.distribution_and_value(batch(4)), strict=True
    ):
        assert torch.equal(getattr(ours, "logits", ours), getattr(theirs, "logits", theirs))


def test_a_deepcopy_is_independent_and_whole(agent):
    twin = copy.deepcopy(agent)
    before = agent.joint(batch(4))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    after = agent.joint(batch(4))
    assert torch.equal(before["logits"], after["logits"])
    # All ways into the copy see its new parameters.
    joint = twin.joint(batch(4))
    assert not torch.equal(joint["state_value"], before["state_value"])
    assert torch.equal(twin.policy(batch(4))["logits"], joint["logits"])
    assert torch.equal(twin.value(batch(4))["state_value"], joint["state_value"])
    distribution, value = twin.distribution_and_value(batch(4))
    assert torch.equal(value, joint["state_value"])
    torch.testing.assert_close(distribution.logits, joint["logits"].log_softmax(-1))


def test_the_actor_and_the_critic_share_no_parameter_when_separate(env):
    agent = ActorCritic.for_env(env, shared=False)
    agent.value(batch(4))["state_value"].sum().backward()
    assert all(parameter.grad is None for parameter in agent.policy.parameters())
