"""Running statistics in agents: who sees them, copies them, saves them."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.checkpoint import Checkpoint
from torchrl.objectives import DQNLoss, SACLoss

from fp8rl_torchrl import evaluate, twin
from fp8rl_torchrl.envs import CartPoleEnv, PendulumEnv
from fp8rl_torchrl.models import actor_q, networks
from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.models.normalize import Normalize, RunningStatistics
from fp8rl_torchrl.models.q_network import QNetwork

KINDS = ["shared", "separate", "q-network", "dueling", "stochastic", "deterministic", "discrete"]


def build(kind):
    """An agent that normalises, its environment, and networks of it that read the observation alone."""
    torch.manual_seed(0)
    env = (PendulumEnv if kind in ("stochastic", "deterministic") else CartPoleEnv)(num_envs=4, seed=0)
    if kind in ("shared", "separate"):
        agent = ActorCritic.for_env(env, (16,), shared=kind == "shared", normalize=True)
        return env, agent, [agent.policy, agent.value, agent.joint]
    if kind in ("q-network", "dueling"):
        agent = QNetwork.for_env(env, (16,), normalize=True, dueling=kind == "dueling", epsilon=0.0)
        return env, agent, [agent.values, agent.policy]
    agent = ActorQ.for_env(env, (16,), normalize=True, noise=0.0 if kind == "deterministic" else None)
    return env, agent, [agent.actor, agent.policy, *([agent.qvalue] if kind == "discrete" else [])]


def observations(env, *shape):
    size = env.observation_spec["observation"].shape[-1]
    return torch.randn(*shape, size, generator=torch.Generator().manual_seed(1))


def outputs(network, env):
    """The numbers that a network writes, but nothing sampled."""
    return said_of(observations(env, 5), network)


def said_of(observation, network):
    found = network(TensorDict(observation=observation, batch_size=[5]))
    keys = {"logits", "loc", "scale", "state_value", "action_value"} & set(found.keys()) or {"action"}
    return torch.cat([found[key].detach() for key in sorted(keys)], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_normalises_what_its_networks_read(kind):
    env, agent, parts = build(kind)
    before = [outputs(network, env) for network in parts]
    agent.statistics.update(3 * observations(env, 100) + 1)
    after = [outputs(network, env) for network in parts]
    # The same network, told to normalise by nothing, on what was normalised by hand.
    mean, variance = agent.statistics.mean, agent.statistics.variance
    by_hand = ((observations(env, 5) - mean) / (variance + 1e-8).sqrt()).float()
    agent.statistics.load_state_dict(RunningStatistics(len(mean)).state_dict())
    for network, old, new in zip(parts, before, after, strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(new, said_of(by_hand, network), rtol=1e-5, atol=1e-6)


def test_the_action_is_not_normalised():
    env, agent, _ = build("stochastic")
    data = TensorDict(observation=observations(env, 5), action=torch.ones(5, 1), batch_size=[5])
    agent.statistics.update(3 * observations(env, 100) + 1)
    inner = agent.qvalue.module
    features = inner.encoder(torch.cat((Normalize(agent.statistics)(data["observation"]), data["action"]), -1))
    assert torch.equal(agent.qvalue(data)["state_action_value"], inner.head(features))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_and_the_statistics_have_one_name(kind):
    _, agent, _ = build(kind)
    state = agent.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert sum(tensor.dtype == torch.float64 for tensor in state.values()) == 3
    assert {"statistics.mean", "statistics.variance", "statistics.count"} <= set(state)
    names = [name for name, _ in agent.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(agent.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_without_normalisation_there_are_none(kind):
    env, agent, _ = build(kind)
    plain = type(agent).for_env(env, (16,))
    assert plain.statistics is None
    assert not any(isinstance(module, Normalize | RunningStatistics) for module in plain.modules())
    assert not any("statistics" in key for key in plain.state_dict())


# Networks beside the agent's own that must follow its statistics: what each says of some observations.


def copied(env, agent):
    network = copy.deepcopy(agent.values if isinstance(agent, QNetwork) else agent.actor)
    return lambda: outputs(network, env)


def in_another_precision(env, agent):
    network = twin(agent.values if isinstance(agent, QNetwork) else agent.actor, "bf16")
    return lambda: outputs(network, env)


def target(env, agent):
    loss = DQNLoss(agent.values, delay_value=True)

    def run():
        with loss.target_value_network_params.to_module(loss.value_network):
            return outputs(loss.value_network, env)

    return run


def critics(env, agent, which="qvalue_network_params"):
    loss = SACLoss(agent.actor, agent.qvalue, action_spec=env.action_spec_unbatched)
    data = TensorDict(observation=observations(env, 5), action=torch.ones(5, 1), batch_size=[5])

    def value(params):
        with params.to_module(loss.qvalue_network):
            return loss.qvalue_network(data.copy())["state_action_value"]

    return lambda: torch.vmap(value)(getattr(loss, which).data)


def target_critics(env, agent):
    return critics(env, agent, "target_qvalue_network_params")


def actor_of_the_loss(env, agent):
    loss = SACLoss(agent.actor, agent.qvalue, action_spec=env.action_spec_unbatched)

    def run():
        with loss.actor_network_params.to_module(loss.actor_network):
            return outputs(loss.actor_network, env)

    return run


FOLLOWERS = [
    ("q-network", copied),
    ("stochastic", copied),
    ("deterministic", copied),
    ("q-network", in_another_precision),
    ("stochastic", in_another_precision),
    ("q-network", target),
    ("dueling", target),
    ("stochastic", critics),
    ("stochastic", target_critics),
    ("stochastic", actor_of_the_loss),
]


def assert_it_follows(kind, follower):
    env, agent, _ = build(kind)
    run = follower(env, agent)
    before = run()
    agent.statistics.update(3 * observations(env, 100) + 1)
    # Row by row, critic by critic: each output is another one.
    assert (run() != before).any(-1).all()


# TorchRL's losses say so of themselves.
no_updater = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


@no_updater
@pytest.mark.parametrize(("kind", "follower"), FOLLOWERS)
def test_copies_twins_targets_and_critics_follow_the_live_statistics(kind, follower):
    assert_it_follows(kind, follower)


class Registered(Normalize):
    """A layer that owns its statistics, as modules usually do."""

    __deepcopy__ = None

    def __init__(self, statistics, limit=10.0):
        nn.Module.__init__(self)
        self.statistics, self.limit = statistics, limit


@no_updater
@pytest.mark.parametrize(
    ("kind", "follower"),
    [("q-network", copied), ("q-network", target), ("stochastic", critics), ("stochastic", target_critics)],
)
def test_those_of_a_registered_part_would_be_left_behind(kind, follower, monkeypatch):
    """Negative twin."""
    for module in (networks, actor_q):
        monkeypatch.setattr(module, "Normalize", Registered)
    with pytest.raises(AssertionError):
        assert_it_follows(kind, follower)


def test_the_state_of_a_loss_holds_none_of_them():
    env, agent, _ = build("stochastic")
    loss = SACLoss(agent.actor, agent.qvalue, action_spec=env.action_spec_unbatched)
    assert not any(tensor.dtype == torch.float64 for tensor in loss.state_dict().values())


# --- copies of a whole agent, saving and restoring ---


def by_pickle(agent):
    return pickle.loads(pickle.dumps(agent))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_whole_agent_has_statistics_of_its_own(kind, duplicate):
    env, agent, parts = build(kind)
    agent.statistics.update(observations(env, 100))
    other = duplicate(agent)
    own = [outputs(network, env) for network in parts]
    name = "joint" if kind in ("shared", "separate") else "policy"
    before = outputs(getattr(other, name), env)
    assert torch.equal(before, outputs(getattr(agent, name), env))
    other.statistics.update(5 * observations(env, 1000) + 2)
    assert not torch.equal(outputs(getattr(other, name), env), before)
    assert all(torch.equal(outputs(network, env), old) for network, old in zip(parts, own, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_restores_them(kind, tmp_path):
    env, agent, parts = build(kind)
    agent.statistics.update(3 * observations(env, 100) + 1)
    expected = [outputs(network, env) for network in parts]
    Checkpoint(agent=agent).save(tmp_path / "checkpoint")
    env, restored, parts = build(kind)
    assert not any(torch.equal(outputs(network, env), old) for network, old in zip(parts, expected, strict=True))
    Checkpoint(agent=restored).load(tmp_path / "checkpoint")
    assert all(torch.equal(outputs(network, env), old) for network, old in zip(parts, expected, strict=True))
    assert restored.statistics.count == 100
    # They go on from there.
    for each in (agent, restored):
        each.statistics.update(observations(env, 20))
    assert torch.equal(restored.statistics.variance, agent.statistics.variance)


@pytest.mark.parametrize("kind", KINDS)
def test_acting_and_evaluating_leave_them_alone(kind):
    env, agent, _ = build(kind)
    agent.statistics.update(observations(env, 100))
    before = copy.deepcopy(agent.statistics.state_dict())
    env.rollout(10, agent.policy)
    evaluate(agent.policy, env, episodes=2)
    for mode in (agent.train, agent.eval):
        outputs(mode().policy, env)
    assert all(torch.equal(value, before[key]) for key, value in agent.statistics.state_dict().items())
