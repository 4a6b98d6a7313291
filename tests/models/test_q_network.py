"""`QNetwork`: what it writes, how it explores, the dueling head, and precision."""

import copy
import math

import pytest
import torch
from actor_critics import VECTOR, Specs
from gathering import assert_same_batches, build, take
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule

from fp8rl_torchrl import convert
from fp8rl_torchrl.data.fused import FusedCollector
from fp8rl_torchrl.envs import CartPoleEnv
from fp8rl_torchrl.models.networks import Float32Head
from fp8rl_torchrl.models.q_network import DuelingHead, QNetwork
from fp8rl_torchrl.precision.linear import Float8Linear

LOW = [torch.bfloat16, torch.float16]
dueling = pytest.mark.parametrize("dueling", [False, True], ids=["plain", "dueling"])


@pytest.fixture
def env():
    return CartPoleEnv(num_envs=4, seed=0)


def network(env, hidden=(16, 16), **options):
    torch.manual_seed(0)
    return QNetwork.for_env(env, hidden, **options)


def batch(*shape):
    values = torch.randn(*shape, 4, generator=torch.Generator().manual_seed(2))
    return TensorDict(observation=values, batch_size=shape)


def head_of(agent):
    return agent.values.module[0].module[1]


# --- what it writes ---


@dueling
@pytest.mark.parametrize("shape", [(), (5,), (5, 3)])
def test_keys_shapes_and_dtypes(env, shape, dueling):
    agent = network(env, dueling=dueling)
    for operator in (agent.values, agent.policy):
        output = operator(batch(*shape))
        assert output.batch_size == shape
        assert {key: (entry.shape, entry.dtype) for key, entry in output.items()} == {
            "observation": ((*shape, 4), torch.float32),
            "action_value": ((*shape, 2), torch.float32),
            "chosen_action_value": ((*shape, 1), torch.float32),
            "action": (shape, torch.int64),
        }


@dueling
def test_values_takes_the_best_action(env, dueling):
    output = network(env, dueling=dueling).values(batch(100))
    assert torch.equal(output["action"], output["action_value"].argmax(-1))
    assert torch.equal(output["chosen_action_value"].squeeze(-1), output["action_value"].max(-1).values)
    assert output["action"].unique().tolist() == [0, 1]


def test_the_observation_alone_is_read(env):
    agent = network(env)
    assert agent.values.in_keys == ["observation"]
    assert agent.policy.in_keys[0] == "observation"
    assert network(env).values.out_keys == ["action", "action_value", "chosen_action_value"]


# --- exploration ---

MANY = 20_000
# The standard deviation of a frequency of 20,000 draws is at most 0.0035: the bound is five of them.
BOUND = 0.018


def frequency_of_the_best(agent, seed=0):
    """How often the policy takes the best action, of three, for one observation."""
    torch.manual_seed(seed)
    data = TensorDict(observation=torch.tensor([0.3, -0.2, 0.1]).expand(MANY, 3), batch_size=[MANY])
    output = agent.policy(data)
    return (output["action"] == output["action_value"].argmax(-1)).float().mean().item(), output


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_a_random_action_is_taken_with_probability_epsilon(epsilon):
    agent = network(Specs(VECTOR, Categorical(3, (), dtype=torch.int64)), epsilon=epsilon)
    frequency, output = frequency_of_the_best(agent)
    expected = 1 - epsilon * 2 / 3  # one random action in three is the best one
    assert frequency == pytest.approx(expected, abs=BOUND if epsilon else 0)
    counts = torch.bincount(output["action"], minlength=3) / MANY
    best = output["action_value"][0].argmax()
    for action in {0, 1, 2} - {best.item()}:
        assert counts[action].item() == pytest.approx(epsilon / 3, abs=BOUND if epsilon else 0)


def test_epsilon_is_a_tensor_that_is_written():
    agent = network(Specs(VECTOR, Categorical(3, (), dtype=torch.int64)))
    pointer = agent.exploration.eps.data_ptr()
    for epsilon in (0.6, 0.0):
        agent.exploration.eps.fill_(epsilon)
        frequency, _ = frequency_of_the_best(agent)
        assert frequency == pytest.approx(1 - epsilon * 2 / 3, abs=BOUND if epsilon else 0)
    assert agent.exploration.eps.data_ptr() == pointer
    assert "exploration.eps" in agent.state_dict()


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_it_draws_as_torchrls_module_does(env, epsilon):
    agent = network(env, epsilon=epsilon)
    theirs = EGreedyModule(env.action_spec_unbatched, epsilon, 0.0)
    for shape in ((), (50,), (5, 10)):
        found = []
        for exploration in (agent.exploration, theirs):
            torch.manual_seed(3)
            found.append(exploration(agent.values(batch(*shape)))["action"])
        assert torch.equal(*found)


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_deterministic_is_greedy(env, epsilon):
    agent = network(env, epsilon=epsilon)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        output = agent.policy(batch(1000))
    assert torch.equal(output["action"], output["action_value"].argmax(-1))
    explored = agent.policy(batch(1000))
    assert not torch.equal(explored["action"], output["action"])


@pytest.mark.parametrize("epsilon", [-0.1, 1.5, math.nan])
def test_what_is_no_probability_is_refused(env, epsilon):
    with pytest.raises(ValueError, match="epsilon is a probability, in"):
        network(env, epsilon=epsilon)


# --- the dueling head ---


def test_the_dueling_head_by_hand():
    head = DuelingHead(2, 3)
    with torch.no_grad():
        head.value.weight.copy_(torch.tensor([[1.0, 2.0]]))
        head.value.bias.fill_(0.5)
        head.advantage.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]))
        head.advantage.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    # features (1, 2): V = 5.5, A = (1, 3, 6), of mean 10 / 3
    expected = torch.tensor([[5.5 + 1 - 10 / 3, 5.5 + 3 - 10 / 3, 5.5 + 6 - 10 / 3]])
    torch.testing.assert_close(head(torch.tensor([[1.0, 2.0]])), expected)


def test_the_mean_of_dueling_values_is_the_states_value():
    torch.manual_seed(0)
    head, features = DuelingHead(8, 5), torch.randn(7, 3, 8)
    torch.testing.assert_close(head(features).mean(-1, keepdim=True), head.value(features))
    # Negative twin: without the mean taken off, value and advantage could not be told apart.
    naive = head.value(features) + head.advantage(features)
    assert not torch.allclose(naive.mean(-1, keepdim=True), head.value(features), atol=1e-3)


# --- precision ---


@dueling
@pytest.mark.parametrize("dtype", LOW)
def test_the_head_computes_in_fp32_under_autocast(env, dtype, dueling):
    agent = network(env, dueling=dueling)
    with torch.autocast("cpu", dtype=dtype):
        output = agent.values(batch(32))
        features = agent.values.module[0].module[0](batch(32)["observation"])
    assert features.dtype == dtype
    assert output["action_value"].dtype == output["chosen_action_value"].dtype == torch.float32
    assert torch.equal(output["action_value"], head_of(agent)(features.float()))
    # It matters: the encoder did run in the low format.
    assert not torch.equal(agent.values(batch(32))["action_value"], output["action_value"])


@dueling
@pytest.mark.parametrize("normalize", [False, True])
def test_convert_leaves_the_last_layers_alone(env, dueling, normalize):
    agent = network(env, (32, 64, 48), dueling=dueling, normalize=normalize)
    original = copy.deepcopy(agent)
    report = convert(agent, "fp8")
    assert [(layer.in_features, layer.out_features) for layer in report.converted] == [(32, 64), (64, 48)]
    reasons = [layer.reason for layer in report.layers if layer.reason]
    assert reasons == ["a dimension under 16"] + ["last layer of a network"] * (2 if dueling else 1)
    heads = [module for module in head_of(agent).modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in heads} == {Float32Head}
    assert sum(isinstance(module, Float8Linear) for module in agent.modules()) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (each.policy(batch(64))["action_value"] for each in (agent, original))
    assert found.dtype == torch.float32
    difference = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < difference < 0.3  # FP8 did run, and is near


# --- parameters and compositions ---


@dueling
def test_every_parameter_has_one_name(env, dueling):
    agent = network(env, dueling=dueling)
    names = [name for name, _ in agent.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(agent.parameters()))
    # By hand: the encoder has 4 * 16 + 16 + 16 * 16 + 16 = 352, the heads 16 * 2 + 2 and 16 + 1.
    assert sum(parameter.numel() for parameter in agent.parameters()) == 352 + 34 + (17 if dueling else 0)
    assert {id(p) for p in agent.policy.parameters()} == {id(p) for p in agent.parameters()}


def test_a_deepcopy_is_independent_and_whole(env):
    agent = network(env, epsilon=0.0)
    other = copy.deepcopy(agent)
    before = agent.policy(batch(4))["action_value"]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.exploration.eps.fill_(0.5)
    assert torch.equal(agent.policy(batch(4))["action_value"], before)
    assert agent.exploration.eps == 0
    assert torch.equal(other.policy(batch(4))["action_value"], other.values(batch(4))["action_value"])
    assert not torch.equal(other.policy(batch(4))["action_value"], before)


@pytest.mark.parametrize("action", [Bounded(-1, 1, (2,)), OneHot(3), Categorical(3, (2,))])
def test_an_action_that_is_not_categorical_is_refused(action):
    with pytest.raises(ValueError, match=r"(?s)one value for each discrete action.*use sac, td3 or ppo"):
        network(Specs(VECTOR, action))


def test_an_encoder_of_ones_own():
    env = Specs(Bounded(0, 1, (3, 8, 8)), Categorical(5, (), dtype=torch.int64))
    encoder = nn.Sequential(nn.Flatten(-3), nn.Linear(192, 12))
    agent = network(env, encoder=encoder)
    assert agent.values.module[0].module[0] is encoder
    assert agent.policy(TensorDict(observation=torch.rand(7, 3, 8, 8), batch_size=[7]))["action_value"].shape == (7, 5)
    with pytest.raises(ValueError, match="normalize is for the encoder that is built here"):
        network(env, encoder=encoder, normalize=True)


def test_hidden_and_activation_make_the_encoder(env):
    encoder = network(env, (32, 8), activation=nn.Tanh).values.module[0].module[0]
    assert [type(layer) for layer in encoder] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh]
    assert [layer.out_features for layer in list(encoder)[::2]] == [32, 8]


@dueling
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_a_fused_collector_gathers_what_torchrls_does(dueling, epsilon):
    def policy(env):
        return network(env, (16,), dueling=dueling, epsilon=epsilon, normalize=True).policy

    streams = [
        take(build(kind, CartPoleEnv(4, seed=0, max_steps=9), policy), 2) for kind in (Collector, FusedCollector)
    ]
    assert_same_batches(*streams)
    assert any(stream["next", "done"].any() for stream in streams[0])
    greedy = all((each["action"] == each["action_value"].argmax(-1)).all() for each in streams[1])
    assert greedy == (epsilon == 0)


def test_the_policy_compiles_in_one_piece(env):
    agent = network(env, epsilon=0.3, normalize=True)
    compiled = torch.compile(agent.policy, backend="eager", fullgraph=True)
    for epsilon in (0.3, 0.8):
        agent.exploration.eps.fill_(epsilon)
        agent.statistics.update(batch(10)["observation"] + epsilon)
        found = []
        for policy in (compiled, agent.policy):
            torch.manual_seed(1)
            found.append(policy(batch(50)))
        assert torch.equal(found[0]["action"], found[1]["action"])
        assert torch.equal(found[0]["action_value"], found[1]["action_value"])
