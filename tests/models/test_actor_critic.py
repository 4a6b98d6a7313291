"""`ActorCritic`: keys, shapes and dtypes, how often the encoder runs, and that TorchRL's own losses take it."""

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, OneHot, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import A2CLoss, ClipPPOLoss
from torchrl.objectives.value import GAE

from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.networks import Float32Head

LOW = [torch.bfloat16, torch.float16]
VECTOR = Unbounded((3,), dtype=torch.float32)


class Specs(EnvBase):
    """An environment that has specs only."""

    def __init__(self, observation, action):
        super().__init__(batch_size=())
        self.observation_spec = (
            observation if isinstance(observation, Composite) else Composite(observation=observation)
        )
        self.action_spec = action
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict=None, **kwargs): ...

    def _step(self, tensordict): ...

    def _set_seed(self, seed): ...


@pytest.fixture
def env():
    return CustomEnv(num_envs=4, seed=0)


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def agent(env, request):
    torch.manual_seed(0)
    return enliven(ActorCritic.for_env(env, hidden=(16, 16), shared=request.param))


def enliven(agent):
    """Give the actor's head larger weights than it starts with, so that its output depends on the observation."""
    with torch.no_grad():
        for parameter in agent.joint.module[1 if agent.shared else 0].parameters():
            parameter.add_(torch.randn(parameter.shape))
    return agent


def batch(*shape, size=2):
    values = torch.randn(*shape, size, generator=torch.Generator().manual_seed(2))
    return TensorDict(observation=values, batch_size=shape)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def encoders(agent):
    """The encoder, or the actor's and the critic's."""
    actor, _, critic, _ = agent._parts
    return [actor.module] if agent.shared else [actor.module, critic.module]


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


# --- which environments fit ---


def test_hidden_gives_the_widths(env):
    layers = [module for module in ActorCritic.for_env(env, hidden=(32, 8)).modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(2, 32), (32, 8), (8, 2), (8, 1)]
    assert [type(layer) for layer in layers[2:]] == [Float32Head, Float32Head]


def test_continuous_actions_stay_in_their_bounds():
    env = make("Pendulum-v1", num_envs=2, seed=0)
    agent = ActorCritic.for_env(env)
    torch.manual_seed(0)
    actions = env.rollout(50, agent.policy)["action"]
    assert actions.shape == (2, 50, 1)
    assert actions.abs().max() <= 2
    assert actions.abs().max() > 1  # the bounds of ±2 are used, not ±1
    observed = agent.policy(TensorDict(observation=torch.randn(2000, 3), batch_size=[2000]))
    assert observed["action"].min() < -1.5
    assert observed["action"].max() > 1.5
    assert observed["action_log_prob"].isfinite().all()


def test_asymmetric_bounds_are_kept():
    bounds = Bounded(torch.tensor([-2.0, 5.0]), torch.tensor([-1.0, 10.0]))
    actions = ActorCritic.for_env(Specs(VECTOR, bounds)).policy(batch(500, size=3))["action"]
    assert actions[:, 0].min() >= -2
    assert actions[:, 0].max() <= -1
    assert actions[:, 1].min() >= 5
    assert actions[:, 1].max() <= 10


def pixel_encoder():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 10))


@pytest.mark.parametrize("key", ["observation", "pixels"])
@pytest.mark.parametrize("shared", [True, False])
def test_an_encoder_of_ones_own_for_pixels(key, shared):
    env = Specs(Composite({key: Bounded(0, 1, (3, 8, 8))}), Categorical(5, (), dtype=torch.int64))
    encoder = pixel_encoder()
    agent = ActorCritic.for_env(env, encoder=encoder, shared=shared)
    output = agent.joint(TensorDict({key: torch.rand(6, 3, 8, 8)}, batch_size=[6]))
    assert output["logits"].shape == (6, 5)
    assert output["state_value"].shape == (6, 1)
    assert encoders(agent)[0] is encoder
    if not shared:  # a copy, with the same initial weights but its own
        assert encoders(agent)[1] is not encoder
        assert encoders(agent)[1][0].weight is not encoder[0].weight
        assert torch.equal(encoders(agent)[1][0].weight, encoder[0].weight)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (Bounded(0, 1, (3, 8, 8)), Categorical(2, ()), r"'observation' has shape \(3, 8, 8\).*pass encoder="),
        (Composite(pixels=Bounded(0, 1, (3, 8, 8))), Categorical(2, ()), r"'pixels' has shape .*pass encoder="),
        (Categorical(16, ()), Categorical(2, ()), r"'observation' has shape \(\).*pass encoder="),
        (Categorical(16, (3,)), Categorical(2, ()), r"'observation' holds torch.int64 numbers: pass encoder="),
        (
            Composite(position=VECTOR, velocity=VECTOR),
            Categorical(2, ()),
            r"no entry 'observation' .*only \['position', 'velocity'\]; gather .*CatTensors",
        ),
        (VECTOR, Unbounded((2,)), "unsupported action space Unbounded"),
        (VECTOR, Bounded(-torch.inf, torch.inf, (2,)), "the action space is unbounded .*needs finite bounds"),
        (VECTOR, MultiCategorical([3, 4]), "unsupported action space MultiCategorical"),
        (VECTOR, OneHot(4), "unsupported action space OneHot"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(observation, action, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ActorCritic.for_env(Specs(observation, action))


def test_a_missing_observation_is_named(agent):
    with pytest.raises(KeyError, match='"observation" not found'):
        agent.distribution_and_value(TensorDict(other=torch.ones(3, 2), batch_size=[3]))
    with pytest.raises(KeyError, match='"observation" not found'):
        agent.state_value(TensorDict(other=torch.ones(3, 2), batch_size=[3]))


def test_the_environment_is_not_stepped(env):
    before = CustomEnv(num_envs=4, seed=0).reset()["observation"]
    ActorCritic.for_env(env)
    assert torch.equal(env.reset()["observation"], before)


# --- TorchRL's own losses ---


@pytest.mark.parametrize("make_loss", [A2CLoss, ClipPPOLoss])
def test_torchrls_losses_take_it(env, agent, make_loss):
    torch.manual_seed(0)
    rollout = env.rollout(40, agent.policy, break_when_any_done=False).detach()
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=agent.value)
    loss = make_loss(agent.policy, agent.value)
    with torch.no_grad():
        advantage(rollout)
    losses = loss(rollout.reshape(-1))
    total = sum(value for key, value in losses.items() if key.startswith("loss_"))
    total.backward()
    assert total.isfinite()
    for name, parameter in agent.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_torchrls_losses_take_continuous_actions():
    env = make("Pendulum-v1", num_envs=2, seed=0)
    agent = ActorCritic.for_env(env)
    rollout = env.rollout(20, agent.policy).detach()
    with torch.no_grad():
        GAE(gamma=0.99, lmbda=0.95, value_network=agent.value)(rollout)
    losses = ClipPPOLoss(agent.policy, agent.value)(rollout.reshape(-1))
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in agent.parameters())
