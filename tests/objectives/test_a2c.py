"""The advantage actor-critic loss of whole rollouts: by hand, against TorchRL's, and what it reads."""

import copy
import math

import pytest
import torch
from tabular import Table
from torchrl.objectives import A2CLoss
from whole_rollouts import (
    ACTION,
    ADVANTAGE,
    ENDS,
    HALVES,
    STATE,
    VALUES,
    agent_and_rollout,
    assert_close,
    cartpole,
    custom_env,
    gradients,
    most_ends,
    perturb,
    rollout_by_hand,
    rows_seen,
)

from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.objectives import advantages
from fp8rl_torchrl.objectives.a2c import RolloutA2CLoss
from fp8rl_torchrl.objectives.advantages import RolloutAdvantage
from fp8rl_torchrl.training.step import OptimStep

LOW = [torch.bfloat16, torch.float16]
# The probability of action 0 in each state.
FIRST = torch.tensor([0.75, 0.5, 0.2, 0.9, 0.5, 0.5], dtype=torch.float64)


def table():
    return Table(torch.stack((FIRST, 1 - FIRST), -1).log().float(), VALUES)


def loss_by_hand(**options):
    return RolloutA2CLoss(table(), **HALVES, critic_coeff=0.5, entropy_coeff=0.1, **options)


def expected_by_hand(advantage):
    """Losses and their gradients, one step at a time, in float64."""
    losses = {"loss_actor": 0.0, "loss_critic": 0.0, "loss_entropy": 0.0}
    logits, values = torch.zeros(2, 6, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for state, action, weight, delta in zip(
        STATE.flatten(), ACTION.flatten(), advantage.flatten().double(), ADVANTAGE.flatten().double(), strict=True
    ):
        p = torch.stack((FIRST[state], 1 - FIRST[state]))
        entropy = -(p * p.log()).sum()
        losses["loss_actor"] += -weight * p[action].log() / 8
        losses["loss_critic"] += 0.5 * 0.5 * delta**2 / 8
        losses["loss_entropy"] += -0.1 * entropy / 8
        logits[0, state] += -weight * (torch.eye(2).double()[action] - p) / 8
        logits[1, state] += 0.1 * p * (p.log() + entropy) / 8
        values[state] += -0.5 * delta / 8
    return {key: value.item() for key, value in losses.items()}, logits, values


# --- by hand ---


@pytest.mark.parametrize("episode_ends", [None, ENDS])
@pytest.mark.parametrize("normalize", [False, True])
def test_losses_and_gradients_by_hand(episode_ends, normalize):
    loss = loss_by_hand(normalize_advantage=normalize, episode_ends=episode_ends)
    losses = loss(rollout_by_hand())
    advantage = ADVANTAGE.double()
    expected, logits, values = expected_by_hand(
        (advantage - advantage.mean()) / advantage.std() if normalize else advantage
    )
    assert {key: losses[key].item() for key in expected} == pytest.approx(expected, rel=1e-5)
    model = loss.actor_critic
    (actor,) = torch.autograd.grad(losses["loss_actor"], model.logits, retain_graph=True)
    (critic,) = torch.autograd.grad(losses["loss_critic"], model.values)
    (entropy,) = torch.autograd.grad(losses["loss_entropy"], model.logits)
    torch.testing.assert_close(actor.double(), logits[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(entropy.double(), logits[1], rtol=1e-5, atol=1e-7)
    # Through V(s) and not through the targets: state 5 is reached only as a next state.
    torch.testing.assert_close(critic.double(), values, rtol=1e-6, atol=1e-7)
    assert critic[4:].tolist() == [0, 0]


def test_what_is_logged_by_hand():
    losses = loss_by_hand(normalize_advantage=True)(rollout_by_hand())
    # Against actions of probability 1/2: ratios .75/.5, .5/.5, .8/.5, .9/.5 and .25/.5, .5/.5, .9/.5, .25/.5
    ratios = torch.tensor([1.5, 1, 1.6, 1.8, 0.5, 1, 1.8, 0.5], dtype=torch.float64)
    assert losses["rollout_kl"].item() == pytest.approx((ratios - 1 - ratios.log()).mean().item(), rel=1e-5)
    assert losses["rollout_ratio_error"].item() == pytest.approx(0.8, rel=1e-5)
    assert losses["advantage"].item() == pytest.approx(ADVANTAGE.abs().mean().item())  # as it was before normalising
    assert losses["entropy"].item() == pytest.approx(-losses["loss_entropy"].item() / 0.1)
    assert not any(losses[key].requires_grad for key in loss_by_hand().out_keys if not key.startswith("loss_"))


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        (
            "generalized_advantage",
            lambda whole: lambda r, v, n, terminated, d, **o: whole(r, v, n, torch.zeros_like(terminated), d, **o),
        ),
        ("values_after", lambda whole: lambda value, last, *_: torch.cat((value[1:], last[:1]))),
    ],
    ids=["forgets terminations", "takes the reset's observation"],
)
def test_the_numbers_by_hand_reject_broken_targets(monkeypatch, name, broken):
    """Negative twins of the above."""
    monkeypatch.setattr(advantages, name, broken(getattr(advantages, name)))
    losses = loss_by_hand(episode_ends=ENDS)(rollout_by_hand())
    expected, _, _ = expected_by_hand(ADVANTAGE)
    for key in ("loss_actor", "loss_critic"):
        assert losses[key].item() != pytest.approx(expected[key], rel=1e-3)


# --- against TorchRL's ---


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("env", [custom_env, cartpole])
def test_equals_torchrls_loss_with_the_same_advantages(env, shared):
    agent, rollout = agent_and_rollout(env(), shared=shared)
    perturb(agent)
    twin = copy.deepcopy(agent)
    parameters = dict(twin.named_parameters())
    theirs = A2CLoss(twin.policy, twin.value, loss_critic_type="l2", critic_coeff=0.5 * 0.7, entropy_coeff=0.02)
    ours = RolloutA2CLoss(agent, critic_coeff=0.7, entropy_coeff=0.02, episode_ends=most_ends(rollout))
    losses, found = gradients(ours, rollout, dict(agent.named_parameters()))
    expected, gradient = gradients(theirs, RolloutAdvantage(agent)(rollout.clone()), parameters)
    for key, other in [("loss_actor", "loss_objective"), ("loss_critic", "loss_critic"), ("loss_entropy",) * 2]:
        assert losses[key].item() == pytest.approx(expected[other].item(), rel=1e-5, abs=1e-6), key
    assert_close(found, gradient, 1e-5)


# --- one pass of the encoder ---


@pytest.mark.parametrize(("episode_ends", "rows"), [(None, 160), (1, 8), (4, 20)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_encoder_runs_once_over_the_rollout(episode_ends, rows, shared):
    agent, rollout = agent_and_rollout(custom_env(), shared=shared)
    actor, _, critic, _ = agent._parts
    seen = [rows_seen(part.module) for part in ([actor] if shared else [actor, critic])]
    RolloutA2CLoss(agent, episode_ends=episode_ends)(rollout)
    assert seen == ([[160, rows]] if shared else [[160], [160, rows]])


# --- too few ends ---


def test_too_few_episode_ends_skip_the_update():
    agent, rollout = agent_and_rollout(custom_env())
    for ends, skipped in ((most_ends(rollout) - 1, 1), (most_ends(rollout), 0)):
        loss = RolloutA2CLoss(agent, episode_ends=ends)
        step = OptimStep(loss, torch.optim.Adam(loss.parameters(), fused=True), "fp32")
        before = copy.deepcopy(agent.state_dict())
        metrics = step(rollout)
        assert metrics["skipped"] == skipped
        assert metrics["loss_critic"].isnan() == bool(skipped)
        unchanged = all(torch.equal(entry, before[key]) for key, entry in agent.state_dict().items())
        assert unchanged == bool(skipped)


# --- how far the policies are apart ---


@pytest.mark.parametrize("shared", [True, False])
def test_the_collecting_policy_is_at_no_distance_from_itself(shared):
    agent, rollout = agent_and_rollout(custom_env(), shared=shared)
    loss = RolloutA2CLoss(agent)
    # The same arithmetic on batches of other sizes: a few roundings of log-probabilities near -0.7.
    assert loss(rollout)["rollout_kl"].item() == pytest.approx(0, abs=1e-7)
    assert loss(rollout)["rollout_ratio_error"].item() == pytest.approx(0, abs=1e-6)
    perturb(agent)
    assert loss(rollout)["rollout_kl"] > 1e-4
    assert loss(rollout)["rollout_ratio_error"] > 1e-2


# --- what it reads ---


def test_a_single_environment():
    agent, rollout = agent_and_rollout(custom_env(num_envs=None))
    loss = RolloutA2CLoss(agent, episode_ends=most_ends(rollout))
    single, batched = loss(rollout), loss(rollout.unsqueeze(0))
    assert single.batch_size == ()
    for key in loss.out_keys:
        torch.testing.assert_close(single[key], batched[key])


def test_in_keys_are_what_is_read_and_no_more():
    agent, rollout = agent_and_rollout(custom_env())
    loss = RolloutA2CLoss(agent)
    whole, selected = loss(rollout), loss(rollout.select(*loss.in_keys))
    assert set(whole.keys()) == set(loss.out_keys)
    assert all(torch.equal(whole[key], selected[key]) for key in loss.out_keys)
    for missing in loss.in_keys:
        name = missing if isinstance(missing, str) else missing[-1]
        with pytest.raises(KeyError, match=f'"{name}" not found'):
            loss(rollout.select(*(key for key in loss.in_keys if key != missing)))


def test_the_rollout_is_not_changed():
    rollout = rollout_by_hand()
    before = rollout.clone()
    loss_by_hand()(rollout)
    assert set(rollout.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(rollout[key], before[key]) for key in before.keys(True, True))


def test_the_loss_trains_the_agents_own_parameters():
    agent, _ = agent_and_rollout(custom_env(), steps=1)
    names = [name.removeprefix("actor_critic.") for name, _ in RolloutA2CLoss(agent).named_parameters()]
    assert names == [name for name, _ in agent.named_parameters()]


@pytest.mark.parametrize("num_envs", [4, None])
def test_continuous_actions(num_envs):
    env = make("Pendulum-v1", num_envs=num_envs, seed=0)
    agent, rollout = agent_and_rollout(env, steps=20)
    parameters = dict(agent.named_parameters())
    losses, found = gradients(RolloutA2CLoss(agent, episode_ends=0), rollout, parameters)
    assert all(entry.isfinite() for entry in losses.values())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    assert losses["rollout_kl"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_the_loss_is_fp32_arithmetic_on_what_the_networks_return(dtype):
    agent, rollout = agent_and_rollout(custom_env())
    rollout["next", "reward"] += 7e4  # FP16 ends at 65,504
    loss = RolloutA2CLoss(agent, gamma=0.5)
    with torch.autocast("cpu", dtype=dtype):
        losses = loss(rollout)
        value, after = (agent.state_value(part).squeeze(-1).double() for part in (rollout, rollout["next"]))
    assert all(entry.dtype == torch.float32 and entry.isfinite() for entry in losses.values())
    reward, terminated, done = (rollout["next", key].squeeze(-1).double() for key in ("reward", "terminated", "done"))
    advantage, carried = [], 0.0
    for t in reversed(range(40)):
        delta = reward[:, t] + 0.5 * (1 - terminated[:, t]) * after[:, t] - value[:, t]
        carried = delta + 0.5 * 0.95 * (1 - done[:, t]) * carried
        advantage.append(carried)
    expected = 0.25 * torch.stack(advantage).square().mean().item()
    assert losses["loss_critic"].item() == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.1}, r"gamma and lmbda must lie in \[0, 1\]; got 1.1"),
        ({"lmbda": 2.0}, r"gamma and lmbda must lie in \[0, 1\]"),
        ({"episode_ends": -1}, "episode_ends must be >= 0, or None; got -1"),
        ({"critic_coeff": -1.0}, "coefficients must be >= 0; got critic_coeff=-1.0"),
        ({"entropy_coeff": -1.0}, "coefficients must be >= 0; .*entropy_coeff=-1.0"),
        ({"entropy_coeff": math.nan}, "coefficients must be >= 0; .*entropy_coeff=nan"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutA2CLoss(table(), **options)


# --- compiled ---


@pytest.mark.slow
@pytest.mark.parametrize("episode_ends", [None, 5])
@pytest.mark.parametrize("normalize", [False, True])
def test_compiled_equals_eager(episode_ends, normalize):
    agent, rollout = agent_and_rollout(custom_env())
    assert most_ends(rollout) <= 5
    perturb(agent)
    loss = RolloutA2CLoss(agent, episode_ends=episode_ends, normalize_advantage=normalize)
    parameters = dict(agent.named_parameters())
    eager, expected = gradients(loss, rollout, parameters)
    torch._dynamo.reset()
    compiled, found = gradients(torch.compile(loss, fullgraph=True), rollout, parameters)
    for key in ("loss_actor", "loss_critic", "loss_entropy"):
        # A normalised advantage has mean 0, so the actor's loss is a small difference of larger numbers.
        assert compiled[key].item() == pytest.approx(eager[key].item(), rel=1e-5, abs=1e-6), key
    assert_close(found, expected, 1e-5)
