"""`ActorQ`: what its parts read and write, its noise, precision, and TorchRL's losses on it."""

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
from torchrl.objectives import DiscreteSACLoss, SACLoss, TD3Loss

from fp8rl_torchrl import convert
from fp8rl_torchrl.data.fused import FusedCollector
from fp8rl_torchrl.envs import CartPoleEnv, PendulumEnv
from fp8rl_torchrl.models.actor_q import ActorQ, StateActionValue
from fp8rl_torchrl.models.networks import Float32Head
from fp8rl_torchrl.precision.linear import Float8Linear

LOW = [torch.bfloat16, torch.float16]
# Two components whose intervals have different widths: half of them are 2 and 5.
BOX = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))
ACTION = Categorical(3, (), dtype=torch.int64)
KINDS = {"stochastic": (BOX, None), "deterministic": (BOX, 0.1), "discrete": (ACTION, None)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def agent_of(kind, hidden=(16, 16), **options):
    torch.manual_seed(0)
    action, noise = KINDS[kind]
    return ActorQ.for_env(Specs(VECTOR, action), hidden, **{"noise": noise} | options)


def batch(*shape):
    values = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(2))
    return TensorDict(observation=values, batch_size=shape)


# --- what it writes ---


@pytest.mark.parametrize("shape", [(), (5,), (5, 3)])
@every_kind
def test_keys_shapes_and_dtypes(kind, shape):
    agent = agent_of(kind)
    vector, number = ((*shape, 2), torch.float32), (shape, torch.float32)
    of_the_actor = {
        "stochastic": {"loc": vector, "scale": vector, "action": vector, "action_log_prob": number},
        "deterministic": {"action": vector},
        "discrete": {
            "logits": ((*shape, 3), torch.float32),
            "action": (shape, torch.int64),
            "action_log_prob": number,
        },
    }[kind]
    of_the_values = (
        {"action_value": ((*shape, 3), torch.float32)}
        if kind == "discrete"
        else {"state_action_value": ((*shape, 1), torch.float32)}
    )
    for actor in (agent.actor, agent.policy):
        output = actor(batch(*shape))
        assert output.batch_size == shape
        found = {key: (entry.shape, entry.dtype) for key, entry in output.items() if not key.startswith("_")}
        assert found == {"observation": ((*shape, 3), torch.float32)} | of_the_actor
        assert agent.actor.out_keys[-len(of_the_actor) :]  # TorchRL's losses read them
        values = agent.qvalue(output.select("observation", "action"))
        for key, (extent, dtype) in of_the_values.items():
            assert (values[key].shape, values[key].dtype) == (extent, dtype)


@every_kind
def test_what_each_part_reads(kind):
    agent = agent_of(kind)
    assert agent.actor.in_keys == ["observation"]
    assert agent.policy.in_keys[0] == "observation"
    assert agent.qvalue.in_keys == (["observation"] if kind == "discrete" else ["observation", "action"])


def test_a_state_action_value_by_hand():
    value = StateActionValue(nn.Identity(), 3, None)
    with torch.no_grad():
        value.head.weight.copy_(torch.tensor([[1.0, 10.0, 100.0]]))
        value.head.bias.fill_(0.5)
    found = value(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0], [-1.0]]))
    assert found.tolist() == [[321.5], [-99.5]]


@every_kind
def test_actor_and_values_share_nothing(kind):
    agent = agent_of(kind)
    assert not {id(p) for p in agent.actor.parameters()} & {id(p) for p in agent.qvalue.parameters()}
    names = [name for name, _ in agent.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(agent.parameters()))
    # By hand: an encoder of 3 or of 3 + 2 numbers, 16 and 16 wide, and heads of 16 features.
    actor = 3 * 16 + 16 + 16 * 16 + 16 + {"stochastic": 4, "deterministic": 2, "discrete": 3}[kind] * 17
    values = (3 if kind == "discrete" else 5) * 16 + 16 + 16 * 16 + 16 + (3 if kind == "discrete" else 1) * 17
    assert sum(parameter.numel() for parameter in agent.actor.parameters()) == actor
    assert sum(parameter.numel() for parameter in agent.parameters()) == actor + values


def test_a_deepcopy_is_independent_and_whole():
    agent = agent_of("deterministic", noise=0.0)
    other = copy.deepcopy(agent)
    before = agent.policy(batch(4))["action"]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.exploration.sigma.fill_(0.5)
    assert torch.equal(agent.policy(batch(4))["action"], before)
    assert not torch.equal(other.actor(batch(4))["action"], before)
    assert not torch.equal(other.policy(batch(4))["action"], other.actor(batch(4))["action"])


# --- exploration ---

MANY = 20_000


def deviations(agent):
    """What the policy's actions differ by from the actor's, for one observation."""
    torch.manual_seed(0)
    data = TensorDict(observation=torch.tensor([0.3, -0.2, 0.1]).expand(MANY, 3), batch_size=[MANY])
    return agent.policy(data.clone())["action"].detach() - agent.actor(data.clone())["action"].detach()


@pytest.mark.parametrize("noise", [0.05, 0.1])
def test_noise_is_in_units_of_half_the_width_of_each_interval(noise):
    difference = deviations(agent_of("deterministic", noise=noise))
    # The standard deviation of 20,000 draws is off by 0.5 % (one standard deviation): the bound is five of these.
    assert difference.std(0).tolist() == pytest.approx([2 * noise, 5 * noise], rel=0.025)
    # That of their mean is 0.7 % of the noise.
    assert difference.mean(0).tolist() == pytest.approx([0, 0], abs=5 * 0.0071 * 5 * noise)
    # Each component has its own.
    assert abs(torch.corrcoef(difference.T)[0, 1]) < 5 * 0.0071


def test_the_noise_is_a_tensor_that_is_written():
    agent = agent_of("deterministic", noise=0.1)
    agent.exploration.sigma.fill_(0.04)
    assert deviations(agent).std(0).tolist() == pytest.approx([0.08, 0.2], rel=0.025)
    agent.exploration.sigma.fill_(0.0)
    assert not deviations(agent).any()
    assert "exploration.sigma" in agent.state_dict()


def test_noisy_actions_stay_in_their_bounds():
    agent = agent_of("deterministic", noise=2.0)
    actions = agent.policy(batch(500))["action"]
    assert BOX.expand(500, 2).is_in(actions)
    for component, bounds in enumerate([(-2.0, 2.0), (0.0, 10.0)]):
        assert (actions[:, component].min().item(), actions[:, component].max().item()) == bounds


@every_kind
def test_deterministic_takes_the_actors_action(kind):
    agent = agent_of(kind)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        first, second, actor = agent.policy(batch(100)), agent.policy(batch(100)), agent.actor(batch(100))
    assert torch.equal(first["action"], second["action"])
    assert torch.equal(first["action"], actor["action"])
    assert not torch.equal(agent.policy(batch(100))["action"], agent.policy(batch(100))["action"])
    if kind == "deterministic":  # the actor explores nowhere
        assert torch.equal(agent.actor(batch(100))["action"], first["action"])


def test_a_stochastic_agent_adds_no_noise():
    agent = agent_of("stochastic")
    assert agent.exploration is None
    assert agent.policy is agent.actor


def test_the_deterministic_actor_begins_in_the_middle_and_uses_its_bounds():
    agent = agent_of("deterministic")
    head = agent.actor.module[1].module
    actions = agent.actor(batch(200))["action"]
    assert (actions - torch.tensor([0.0, 5.0])).abs().max() < 0.5  # the gain of its last layer is 0.01
    for sign, ends in ((-1e4, [-2.0, 0.0]), (1e4, [2.0, 10.0])):
        with torch.no_grad():
            head.weight.fill_(sign)  # of features that are not negative
        actions = agent.actor(batch(200))["action"]
        assert BOX.expand(200, 2).is_in(actions)
        torch.testing.assert_close(actions.median(0).values, torch.tensor(ends), rtol=0, atol=0.01)


@pytest.mark.parametrize("noise", [-0.1, math.nan])
def test_noise_that_is_none_is_refused(noise):
    with pytest.raises(ValueError, match="noise is a standard deviation, >= 0"):
        agent_of("deterministic", noise=noise)


@pytest.mark.parametrize(
    ("action", "options", "message"),
    [
        (ACTION, {"noise": 0.1}, "a deterministic actor needs a bounded continuous action"),
        (OneHot(3), {}, "unsupported action space"),
        (Bounded(-math.inf, math.inf, (2,)), {}, "the action space is unbounded"),
        (BOX, {"hidden": ()}, "hidden must name at least one layer"),
        (BOX, {"hidden": 64}, "hidden must name at least one layer"),
    ],
)
def test_what_it_does_not_fit_is_refused(action, options, message):
    with pytest.raises(ValueError, match=message):
        ActorQ.for_env(Specs(VECTOR, action), **options)


# --- precision ---


def layers_of(agent, part):
    return [module for module in getattr(agent, part).modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", LOW)
@every_kind
def test_the_heads_compute_in_fp32_under_autocast(kind, dtype):
    agent, features = agent_of(kind), {}
    for part in ("actor", "qvalue"):
        head = layers_of(agent, part)[-1]
        assert type(head) is Float32Head
        head.register_forward_hook(lambda head, args, output, part=part: features.update({part: (args[0], output)}))
    data = batch(32) if kind == "discrete" else batch(32).set("action", torch.ones(32, 2))
    with torch.autocast("cpu", dtype=dtype):
        action = agent.policy(data.clone())
        values = agent.qvalue(data.clone())
    for part, (read, written) in features.items():
        head = layers_of(agent, part)[-1]
        assert read.dtype == dtype  # the encoder did run in the low format
        assert torch.equal(written, nn.functional.linear(read.float(), head.weight, head.bias))
    floating = [entry for each in (action, values) for key, entry in each.items() if not key.startswith("_")]
    assert {entry.dtype for entry in floating if entry.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("normalize", [False, True])
@every_kind
def test_convert_leaves_the_last_layers_alone(kind, normalize):
    agent = agent_of(kind, (32, 64, 48), normalize=normalize)
    original = copy.deepcopy(agent)
    report = convert(agent, "fp8")
    assert [(each.in_features, each.out_features) for each in report.converted] == [(32, 64), (64, 48)] * 2
    reasons = [layer.reason for layer in report.layers if layer.reason]
    assert reasons == ["a dimension under 16", "last layer of a network"] * 2
    for part in ("actor", "qvalue"):
        kinds = [type(layer) for layer in layers_of(agent, part)]
        assert kinds == [nn.Linear, Float8Linear, Float8Linear, Float32Head]
    data = batch(64) if kind == "discrete" else batch(64).set("action", torch.ones(64, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (each.qvalue(data.clone())[each.qvalue.out_keys[0]] for each in (agent, original))
    difference = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < difference < 0.3  # FP8 did run, and is near


# --- TorchRL's losses and collectors ---


def loss_of(kind, agent):
    action, _ = KINDS[kind]
    if kind == "deterministic":
        return TD3Loss(agent.actor, agent.qvalue, action_spec=action, num_qvalue_nets=2)
    if kind == "discrete":
        return DiscreteSACLoss(agent.actor, agent.qvalue, action_space=action, num_actions=3)
    return SACLoss(agent.actor, agent.qvalue, action_spec=action)


def transitions(agent, size=12):
    data = agent.policy(batch(size)).detach()
    flags = {key: torch.zeros(size, 1, dtype=torch.bool) for key in ("terminated", "done")}
    after = TensorDict({**batch(size).flip(0), "reward": torch.ones(size, 1), **flags}, batch_size=[size])
    return data.set("next", after)


@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("normalize", [False, True])
@every_kind
def test_torchrls_losses_reach_every_parameter(kind, normalize, dtype):
    agent = agent_of(kind, normalize=normalize)
    loss = loss_of(kind, agent)
    loss.make_value_estimator(gamma=0.9)
    data = transitions(agent)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses = loss(data)
    total = losses["loss_actor"] + losses["loss_qvalue"]
    assert total.dtype == torch.float32
    total.backward()
    for params in (loss.actor_network_params, loss.qvalue_network_params):
        for name, parameter in params.items(True, True):
            if isinstance(parameter, nn.Parameter):
                assert parameter.grad.isfinite().all(), name
    # The actor that is trained is the agent's own.
    assert all(parameter.grad.any() for parameter in agent.actor.parameters())


CASES = [
    (PendulumEnv, {}),
    (PendulumEnv, {"noise": 0.3}),
    (PendulumEnv, {"noise": 0.3, "normalize": True}),
    (PendulumEnv, {"state_dependent_noise": True}),
    (CartPoleEnv, {"normalize": True}),
]


@pytest.mark.parametrize(("env", "options"), CASES)
def test_a_fused_collector_gathers_what_torchrls_does(env, options):
    def policy(env):
        torch.manual_seed(0)
        return ActorQ.for_env(env, (16,), **options).policy

    streams = [take(build(kind, env(4, seed=0), policy), 2) for kind in (Collector, FusedCollector)]
    assert_same_batches(*streams)
    assert streams[0][0]["action"].unique().numel() > 1


@every_kind
def test_the_policy_compiles_in_one_piece(kind):
    agent = agent_of(kind, normalize=True)
    compiled = torch.compile(agent.policy, backend="eager", fullgraph=True)
    for shift in (0.0, 5.0):
        agent.statistics.update(batch(10)["observation"] + shift)
        found = []
        for policy in (compiled, agent.policy):
            torch.manual_seed(1)
            found.append(policy(batch(50))["action"])
        assert torch.equal(*found)
