"""Running statistics and the layer that normalises by them: their numbers, and who sees them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from actor_critics import batch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
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

# --- the numbers ---


def test_two_batches_by_hand():
    statistics = RunningStatistics(2)
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([0, 0], [1, 1], 0)
    statistics.update(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([2, 10], [1, 0], 2)
    # 1, 3, 5, 7: mean 4, squares 9 + 1 + 1 + 9; 10, 10, 10, 50: mean 20, squares 3 * 100 + 900.
    statistics.update(torch.tensor([[[5.0, 10.0]], [[7.0, 50.0]]]))
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([4, 20], [5, 300], 4)


def assert_those_of(statistics, data):
    """The statistics are those that numpy finds in all data at once, ``[n, size]``, up to the rounding of float64."""
    exact = data.astype(np.float64)
    scale = np.abs(exact).max(initial=1)
    assert statistics.count.item() == len(data)
    np.testing.assert_allclose(statistics.mean.numpy(), exact.mean(0), rtol=0, atol=1e-14 * scale)
    spread = exact.std(0).max()
    # Each merge rounds the mean to 1e-16 of its size; the variance sees that difference times the spread.
    bound = 1e-12 * spread**2 + 1e-14 * scale * spread + 1e-28 * scale**2
    np.testing.assert_allclose(statistics.variance.numpy(), exact.var(0), rtol=0, atol=bound)


def shown(statistics, data, cuts):
    """The statistics after an update by each of the pieces of the data."""
    for piece in np.split(data, sorted(cuts)):
        statistics.update(torch.from_numpy(piece))
    return statistics


@settings(max_examples=100, deadline=None)
@given(
    data=st.tuples(st.integers(1, 40), st.integers(1, 3)).flatmap(
        lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32))
    ),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
@example(data=np.array([[1.0]], np.float32), offset=0.0, cuts=[0, 0, 1])
def test_any_batching_gives_the_statistics_of_all_data(data, offset, cuts):
    data = data + np.float32(offset)
    assert_those_of(shown(RunningStatistics(data.shape[1]), data, cuts), data)


def far_from_zero():
    return (1e6 + np.random.default_rng(0).normal(size=(4000, 2))).astype(np.float32)


class SumsOfSquares(RunningStatistics):
    """The textbook formula E[x²] - E[x]², which loses the digits of a spread that is small beside the mean."""

    def update(self, observations):
        seen, new = self.count.clone(), observations.double()
        squares = (self.variance + self.mean**2) * seen + new.square().sum(0)
        self.mean.copy_((self.mean * seen + new.sum(0)) / (seen + len(new)))
        self.count.add_(len(new))
        self.variance.copy_(squares / self.count - self.mean**2)


def test_statistics_far_from_zero_keep_their_digits():
    data, cuts = far_from_zero(), range(0, 4000, 7)
    assert_those_of(shown(RunningStatistics(2), data, cuts), data)
    for worse in (SumsOfSquares(2), RunningStatistics(2).float()):
        with pytest.raises(AssertionError):
            assert_those_of(shown(worse, data, cuts), data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_is_left_out(bad):
    statistics, expected = RunningStatistics(2), RunningStatistics(2)
    usable = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    broken = torch.tensor([[100.0, 200.0], [300.0, bad]])
    statistics.update(broken)
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([0, 0], [1, 1], 0)
    for each in (usable, broken, usable + 1):
        statistics.update(each)
    for each in (usable, usable + 1):
        expected.update(each)
    for key, value in expected.state_dict().items():
        assert torch.equal(statistics.state_dict()[key], value), key


def test_no_observations_change_nothing():
    statistics = RunningStatistics(2)
    statistics.update(torch.empty(0, 2))
    statistics.update(torch.tensor([1.0, 2.0]))  # a single one
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count.item()) == ([1, 2], [0, 0], 1)


@pytest.mark.parametrize("shape", [(5, 4), (4,), (5, 2, 1), ()])
def test_observations_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"statistics of observations \[\.\.\., 2\]; got \["):
        RunningStatistics(2).update(torch.zeros(shape))


# --- the layer ---


def test_normalised_by_hand():
    statistics = RunningStatistics(2)
    layer = Normalize(statistics, limit=2.0)
    observation = torch.tensor([[5.0, -1.5], [0.5, 100.0]])
    # Before the first update, nothing but the clipping.
    torch.testing.assert_close(layer(observation), torch.tensor([[2.0, -1.5], [0.5, 2.0]]))
    statistics.update(torch.tensor([[1.0, 0.0], [5.0, 20.0]]))  # means 3 and 10, standard deviations 2 and 10
    torch.testing.assert_close(layer(observation), torch.tensor([[1.0, -1.15], [-1.25, 2.0]]))
    assert layer(observation.expand(3, 2, 2)).shape == (3, 2, 2)


def test_a_component_that_never_changes_is_zero():
    statistics = RunningStatistics(1)
    for _ in range(3):
        statistics.update(torch.full((7, 1), 0.1))
    assert Normalize(statistics)(torch.full((2, 1), 0.1)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_computes_in_fp32_under_autocast(dtype):
    statistics = RunningStatistics(2)
    statistics.update(batch(50)["observation"] + 100)
    layer, observation = Normalize(statistics), batch(8)["observation"] + 100
    with torch.autocast("cpu", dtype=dtype):
        normalised = layer(observation)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised, layer(observation))


def test_print_shows_the_size_and_the_limit():
    assert repr(Normalize(RunningStatistics(3), 5.0)) == "Normalize(3, limit=5.0)"


def test_both_compile_in_one_piece():
    statistics, expected = RunningStatistics(2), RunningStatistics(2)
    update = torch.compile(statistics.update, backend="eager", fullgraph=True)
    forward = torch.compile(Normalize(statistics), backend="eager", fullgraph=True)
    for seed in range(3):  # what was compiled once sees every later update
        data = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        update(data)
        expected.update(data)
        assert torch.equal(forward(data), Normalize(expected)(data))


# --- who sees them ---

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
    found = network(TensorDict(observation=observations(env, 5), batch_size=[5]))
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
        data = TensorDict(observation=by_hand, batch_size=[5])
        found = network(data)
        keys = {"logits", "loc", "scale", "state_value", "action_value"} & set(found.keys()) or {"action"}
        torch.testing.assert_close(new, torch.cat([found[key] for key in sorted(keys)], -1), rtol=1e-5, atol=1e-6)


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
    names = ["joint"] if kind in ("shared", "separate") else ["policy"]
    for name in names:
        assert torch.equal(outputs(getattr(other, name), env), outputs(getattr(agent, name), env))
        before = outputs(getattr(other, name), env)
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
