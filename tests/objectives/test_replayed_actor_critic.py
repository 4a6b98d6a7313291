"""The replayed actor-critic loss: by hand, what it reads, in every format, and for continuous actions."""

import math

import pytest
import torch
from tabular import NEVER, Table, transitions
from torchrl.modules import TanhNormal

from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.objectives.replayed_actor_critic import ReplayedActorCriticLoss

LOW = [torch.bfloat16, torch.float16]


# --- two transitions by hand ---


# In state 0 the policy takes action 0 with probability 3/4, in state 1 either with 1/2; V = (1, 2), gamma = 1/2.
#   transition 1: weight 0.75 / 0.25 = 3, truncated to 2; delta =  1 + 0.5 * 2 - 1 = 1;  log pi = log 0.75
#   transition 2: weight 0.5 / 1 = 0.5;                   delta = -1 + 0 - 2 = -3;       log pi = log 0.5


def table_by_hand():
    return Table([[math.log(3.0), 0.0], [0.0, 0.0]], [1.0, 2.0])


def batch_by_hand():
    return transitions([0, 1], [0, 1], [0.25, 1.0], [1.0, -1.0], [1, 0], [False, True])


def loss_by_hand(table, **options):
    options = {"gamma": 0.5, "max_weight": 2.0, "critic_coeff": 0.5, "entropy_coeff": 0.1} | options
    return ReplayedActorCriticLoss(table, **options)


def test_losses_by_hand():
    losses = loss_by_hand(table_by_hand())(batch_by_hand())
    actor = -(2 * 1 * math.log(0.75) + 0.5 * -3 * math.log(0.5)) / 2  # -0.2321783
    critic = 0.5 * 0.5 * (2 * 1**2 + 0.5 * 3**2) / 2  # 0.8125
    entropy = (-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2)) / 2  # 0.6277412
    expected = {
        "loss_actor": actor,
        "loss_critic": critic,
        "loss_entropy": -0.1 * entropy,
        "entropy": entropy,
        "importance_weight": (3 + 0.5) / 2,
        "td_error": (1 + 3) / 2,
    }
    assert losses.batch_size == ()
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=1e-6)
    assert (actor, critic, entropy) == pytest.approx((-0.2321783, 0.8125, 0.6277412), abs=1e-7)


def test_gradients_by_hand():
    table = table_by_hand()
    losses = loss_by_hand(table)(batch_by_hand())
    (actor,) = torch.autograd.grad(losses["loss_actor"], table.logits, retain_graph=True)
    (critic,) = torch.autograd.grad(losses["loss_critic"], table.values)
    # -(weight * delta / 2) * (one-hot action - probabilities)
    torch.testing.assert_close(actor, torch.tensor([[-0.25, 0.25], [-0.375, 0.375]]))
    # -c_V * weight * delta / 2, through V(s) and not through V(s')
    torch.testing.assert_close(critic, torch.tensor([-0.5, 0.375]))


def test_gradients_flow_only_where_documented():
    table = table_by_hand()
    losses = loss_by_hand(table)(batch_by_hand())
    reached = {"loss_actor": (True, False), "loss_critic": (False, True), "loss_entropy": (True, False)}
    for key, expected in reached.items():
        gradients = torch.autograd.grad(losses[key], (table.logits, table.values), retain_graph=True, allow_unused=True)
        assert tuple(gradient is not None for gradient in gradients) == expected, key
    assert not any(losses[key].requires_grad for key in ("entropy", "importance_weight", "td_error"))


@pytest.mark.parametrize(
    ("terminated", "delta"),
    [(False, 1 + 0.5 * 2 - 1), (True, 1 - 1)],
)
def test_bootstraps_through_truncation_and_not_through_termination(terminated, delta):
    batch = transitions([0], [0], [0.75], [1.0], [1], [terminated])
    # Both transitions end their episode; only `terminated` tells whether there is a future.
    batch["next", "done"] = torch.tensor([[True]])
    batch["next", "truncated"] = torch.tensor([[not terminated]])
    losses = loss_by_hand(table_by_hand())(batch)
    assert losses["td_error"].item() == pytest.approx(abs(delta), abs=1e-6)
    assert losses["loss_critic"].item() == pytest.approx(0.25 * delta**2, abs=1e-6)


@pytest.mark.parametrize(
    ("max_weight", "used"),
    [(0.4, (0.4, 0.4)), (1.0, (1.0, 0.5)), (2.0, (2.0, 0.5)), (3.1, (3.0, 0.5)), (NEVER, (3.0, 0.5))],
)
def test_weights_are_truncated_at_max_weight(max_weight, used):
    losses = loss_by_hand(table_by_hand(), max_weight=max_weight)(batch_by_hand())
    assert losses["loss_critic"].item() == pytest.approx(0.25 * (used[0] * 1 + used[1] * 9) / 2, rel=1e-6)
    actor = -(used[0] * math.log(0.75) - used[1] * 3 * math.log(0.5)) / 2
    assert losses["loss_actor"].item() == pytest.approx(actor, rel=1e-6)
    assert losses["importance_weight"].item() == pytest.approx(1.75)  # before truncation


def test_experience_of_the_policy_itself_has_weight_one():
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env)
    rollout = env.rollout(20, agent.policy, break_when_any_done=False).detach().reshape(-1)
    losses = ReplayedActorCriticLoss(agent)(rollout)
    assert losses["importance_weight"].item() == pytest.approx(1.0, abs=1e-6)


def test_the_entropy_bonus_raises_the_entropy():
    table = Table([[2.0, 0.0, -1.0]], [0.0])
    batch = transitions([0], [0], [0.5], [0.0], [0], [False])
    loss = ReplayedActorCriticLoss(table, entropy_coeff=0.1)
    losses = loss(batch)
    assert losses["loss_entropy"].item() == pytest.approx(-0.1 * losses["entropy"].item())
    (gradient,) = torch.autograd.grad(losses["loss_entropy"], table.logits)
    with torch.no_grad():
        table.logits -= gradient
    assert loss(batch)["entropy"] > losses["entropy"]


@pytest.mark.parametrize("coefficient", [0, 0.0])
def test_without_a_coefficient_there_is_no_loss_of_the_entropy(coefficient):
    loss = loss_by_hand(table_by_hand(), entropy_coeff=coefficient)
    losses, whole = loss(batch_by_hand()), loss_by_hand(table_by_hand())(batch_by_hand())
    assert set(losses.keys()) == set(loss.out_keys) == set(whole.keys()) - {"loss_entropy"}
    assert all(torch.equal(losses[key], whole[key]) for key in losses.keys())
    assert losses["entropy"] > 0  # it is logged all the same


# --- what it reads ---


def test_in_keys_are_what_is_read_and_no_more():
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env)
    loss = ReplayedActorCriticLoss(agent)
    assert set(loss.in_keys) == {
        "observation",
        "action",
        "action_log_prob",
        ("next", "observation"),
        ("next", "reward"),
        ("next", "terminated"),
    }
    rollout = env.rollout(8, agent.policy).detach().reshape(-1)
    whole, selected = loss(rollout), loss(rollout.select(*loss.in_keys))
    assert set(whole.keys()) == set(loss.out_keys)
    assert all(torch.equal(whole[key], selected[key]) for key in loss.out_keys)
    for missing in loss.in_keys:
        name = missing if isinstance(missing, str) else missing[-1]
        with pytest.raises(KeyError, match=f'"{name}" not found'):
            loss(rollout.select(*(key for key in loss.in_keys if key != missing)))


def test_in_keys_follow_the_model():
    table = Table([[1.0, 0.0]], [0.0], key="pixels")
    loss = ReplayedActorCriticLoss(table)
    assert {"pixels", ("next", "pixels")} < set(loss.in_keys)
    batch = transitions([0], [1], [0.5], [1.0], [0], [False], key="pixels")
    assert loss(batch.select(*loss.in_keys))["loss_actor"].isfinite()


def test_the_batch_is_not_changed():
    batch = batch_by_hand()
    before = batch.clone()
    loss_by_hand(table_by_hand())(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(batch[key], before[key]) for key in before.keys(True, True))


def test_a_batch_of_any_shape():
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env)
    rollout = env.rollout(8, agent.policy).detach()
    loss = ReplayedActorCriticLoss(agent)
    grid, flat = loss(rollout), loss(rollout.reshape(-1))
    for key in loss.out_keys:
        torch.testing.assert_close(grid[key], flat[key])


def test_the_loss_trains_the_agents_own_parameters():
    agent = ActorCritic.for_env(CustomEnv(num_envs=4, seed=0))
    loss = ReplayedActorCriticLoss(agent)
    assert {id(parameter) for parameter in loss.parameters()} == {id(parameter) for parameter in agent.parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.1}, r"gamma must lie in \[0, 1\]; got 1.1"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\]"),
        ({"gamma": float("nan")}, r"gamma must lie in \[0, 1\]"),
        ({"max_weight": 0.0}, "max_weight must be > 0"),
        ({"critic_coeff": -1.0}, "coefficients must be >= 0; got critic_coeff=-1.0"),
        ({"entropy_coeff": -1.0}, "coefficients must be >= 0; .*entropy_coeff=-1.0"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReplayedActorCriticLoss(table_by_hand(), **options)


# --- formats ---


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_is_fp32_arithmetic_on_what_the_networks_return(dtype, shared):
    torch.manual_seed(0)
    env = CustomEnv(num_envs=8, seed=0)
    agent = ActorCritic.for_env(env, shared=shared)
    batch = env.rollout(8, agent.policy).detach().reshape(-1)
    batch["action_log_prob"] -= 0.3
    with torch.autocast("cpu", dtype=dtype):
        losses = ReplayedActorCriticLoss(agent, gamma=0.9, max_weight=1.2)(batch)
        distribution, value = agent.distribution_and_value(batch)
        following = agent.state_value(batch["next"])
    assert all(entry.dtype == torch.float32 for entry in losses.values())
    # The arithmetic once more, in float64, from the networks' outputs.
    value, following = value.double(), following.double()
    target = batch["next", "reward"].double() + 0.9 * ~batch["next", "terminated"] * following
    delta = (target - value).squeeze(-1)
    log_prob = distribution.logits.double().log_softmax(-1).gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
    weight = (log_prob - batch["action_log_prob"].double()).exp().clamp(max=1.2)
    assert losses["loss_actor"].item() == pytest.approx(-(weight * delta * log_prob).mean().item(), rel=1e-6)
    assert losses["loss_critic"].item() == pytest.approx(0.25 * (weight * delta**2).mean().item(), rel=1e-6)
    # It matters: in FP32 throughout the value is another.
    assert ReplayedActorCriticLoss(agent, gamma=0.9, max_weight=1.2)(batch)["loss_critic"] != losses["loss_critic"]


def test_targets_beyond_the_range_of_fp16_stay_finite():
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env)
    batch = env.rollout(4, agent.policy).detach().reshape(-1)
    batch["next", "reward"].fill_(1e5)  # FP16 ends at 65,504
    with torch.autocast("cpu", dtype=torch.float16):
        losses = ReplayedActorCriticLoss(agent)(batch)
    assert losses["td_error"].item() == pytest.approx(1e5, rel=1e-3)
    assert all(entry.isfinite() for entry in losses.values())


# --- continuous actions ---


def test_continuous_actions():
    torch.manual_seed(0)
    env = make("Pendulum-v1", num_envs=4, seed=0)
    agent = ActorCritic.for_env(env)
    batch = env.rollout(20, agent.policy).detach().reshape(-1)
    losses = ReplayedActorCriticLoss(agent, max_weight=2.0)(batch)
    assert losses["importance_weight"].item() == pytest.approx(1, abs=1e-4)
    sum(losses[key] for key in ("loss_actor", "loss_critic", "loss_entropy")).backward()
    for name, parameter in agent.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_entropy_of_a_tanh_normal_is_estimated_from_samples():
    # In float64: the entropy of N(loc, scale) plus the mean of log |da/du|, a = 2 tanh(u), by the trapezoidal rule.
    loc, scale = 0.3, 0.8
    u = torch.linspace(loc - 10 * scale, loc + 10 * scale, 20_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((u - loc) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
    slope = math.log(2) + torch.log1p(-(u.tanh() ** 2)).clamp(min=-50)
    expected = 0.5 * math.log(2 * math.pi * math.e * scale**2) + torch.trapezoid(density * slope, u).item()
    size = 40_000
    table = Table([[0.0]], [0.0])
    table.distribution_and_value = lambda batch: (
        TanhNormal(torch.full((size, 1), loc), torch.full((size, 1), scale), low=-2, high=2, tanh_loc=False),
        table.state_value(batch),
    )
    batch = transitions([0], [[0.1]], [0.5], [0.0], [0], [False]).expand(size)
    torch.manual_seed(0)
    # One sample per element; the standard deviation of the mean of 40,000 is 0.005.
    assert ReplayedActorCriticLoss(table)(batch)["entropy"].item() == pytest.approx(expected, abs=0.02)
