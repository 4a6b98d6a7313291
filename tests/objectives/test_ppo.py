"""The clipped loss of proximal policy optimisation: by hand, against TorchRL's, and what it reads."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import Table
from tensordict import TensorDict
from torchrl.objectives import ClipPPOLoss
from whole_rollouts import (
    agent_and_rollout,
    assert_close,
    cartpole,
    custom_env,
    gradients,
    most_ends,
    perturb,
    rows_seen,
)

from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.objectives.advantages import RolloutAdvantage
from fp8rl_torchrl.objectives.ppo import JointClipPPOLoss
from fp8rl_torchrl.training.step import OptimStep

LOW = [torch.bfloat16, torch.float16]

# One state per step; the policy takes action 0 with probability 1/2, so a collecting policy's 1/2 / r gives ratio r.
#   ratio 1.5, advantage  2: clipped to 1.2, gain  2.4, no gradient
#   ratio 1.5, advantage -2: not clipped,    gain -3
#   ratio 0.5, advantage  2: not clipped,    gain  1
#   ratio 0.5, advantage -2: clipped to 0.8, gain -1.6, no gradient
#   ratio 1.1, advantage  1: within the bound, gain 1.1
RATIO, ADVANTAGE = [1.5, 1.5, 0.5, 0.5, 1.1], [2.0, -2.0, 2.0, -2.0, 1.0]
VALUE, TARGET = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.0, 1.0, 4.5, 2.0]


def table():
    return Table(torch.zeros(5, 2), VALUE)


def batch_by_hand(ratio=RATIO, advantage=ADVANTAGE):
    ratio = torch.as_tensor(ratio)
    entries = {
        "observation": torch.arange(len(ratio)),
        "action": torch.zeros(len(ratio), dtype=torch.int64),
        "action_log_prob": -ratio.log() + math.log(0.5),
        "advantage": torch.as_tensor(advantage).reshape(-1, 1),
        "value_target": torch.tensor(TARGET[: len(ratio)]).reshape(-1, 1),
    }
    return TensorDict(entries, batch_size=[len(ratio)])


def loss_by_hand(**options):
    options = {"clip_epsilon": 0.2, "critic_coeff": 0.5, "entropy_coeff": 0.1, "normalize_advantage": False} | options
    return JointClipPPOLoss(table(), **options)


def agent_and_batch(env, **options):
    """An agent that has moved away from the one that collected, and flat steps with advantages."""
    agent, rollout = agent_and_rollout(env, **options)
    batch = RolloutAdvantage(agent, episode_ends=most_ends(rollout))(rollout).reshape(-1)
    perturb(agent, 0.1)
    return agent, batch


# --- by hand ---


def test_losses_by_hand():
    losses = loss_by_hand()(batch_by_hand())
    ratios = torch.tensor(RATIO).double()
    expected = {
        "loss_actor": -(2.4 - 3 + 1 - 1.6 + 1.1) / 5,
        "loss_critic": 0.5 * 0.5 * (1 + 0 + 4 + 0.25 + 9) / 5,
        "loss_entropy": -0.1 * math.log(2),
        "entropy": math.log(2),
        "kl": (ratios - 1 - ratios.log()).mean().item(),
        "clip_fraction": 0.8,
    }
    assert losses.batch_size == ()
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected, rel=1e-5)
    assert not any(losses[key].requires_grad for key in ("entropy", "kl", "clip_fraction"))


def test_gradients_by_hand():
    loss = loss_by_hand()
    losses = loss(batch_by_hand())
    model = loss.actor_critic
    (actor,) = torch.autograd.grad(losses["loss_actor"], model.logits)
    (critic,) = torch.autograd.grad(losses["loss_critic"], model.values)
    # -ratio * advantage / 5 * (one-hot - probabilities), nothing where the ratio is clipped
    slope = torch.tensor([0.0, 1.5 * 2, -0.5 * 2, 0.0, -1.1]) / 5 / 2
    torch.testing.assert_close(actor, torch.stack((slope, -slope), -1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(critic, 0.5 * (torch.tensor(VALUE) - torch.tensor(TARGET)) / 5)


def test_the_larger_of_both_gains_is_rejected():
    """Negative twin: the optimistic bound gives another loss on the same numbers."""
    optimistic = -(3 - 2.4 + 1.6 - 1 + 1.1) / 5
    assert loss_by_hand()(batch_by_hand())["loss_actor"].item() != pytest.approx(optimistic, rel=0.1)


def test_normalised_advantages_by_hand():
    advantage = torch.tensor(ADVANTAGE).double()
    normal = ((advantage - 0.2) / math.sqrt((2 * 1.8**2 + 2 * 2.2**2 + 0.8**2) / 4)).tolist()
    whole = loss_by_hand(normalize_advantage=True)(batch_by_hand())
    by_hand = loss_by_hand()(batch_by_hand(advantage=torch.tensor(normal, dtype=torch.float32)))
    for key in whole.keys():
        torch.testing.assert_close(whole[key], by_hand[key])
    assert abs(whole["loss_actor"] - loss_by_hand()(batch_by_hand())["loss_actor"]) > 0.01


def test_equal_advantages_are_normalised_to_zero():
    losses = loss_by_hand(normalize_advantage=True)(batch_by_hand(advantage=[3.0] * 5))
    assert losses["loss_actor"].item() == 0


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0.05, 20), st.floats(-10, 10)), min_size=1, max_size=5),
    epsilon=st.floats(0.05, 0.9),
)
def test_any_batch_equals_the_formula(steps, epsilon):
    ratio, advantage = (torch.tensor(column) for column in zip(*steps, strict=True))
    losses = loss_by_hand(clip_epsilon=epsilon)(batch_by_hand(ratio, advantage))
    gains = [min(r * a, min(max(r, 1 - epsilon), 1 + epsilon) * a) for r, a in steps]
    assert losses["loss_actor"].item() == pytest.approx(-sum(gains) / len(gains), rel=1e-4, abs=1e-4)
    assert 0 <= losses["clip_fraction"] <= 1
    assert losses["kl"] >= -1e-6


# --- a bound that is annealed ---


def test_the_bound_is_a_tensor_that_is_written():
    loss, batch = loss_by_hand(), batch_by_hand()
    for epsilon in (0.05, 0.55, 0.2):
        loss.clip_epsilon.fill_(epsilon)
        found, expected = loss(batch), loss_by_hand(clip_epsilon=epsilon)(batch)
        assert all(torch.equal(found[key], expected[key]) for key in expected.keys()), epsilon
    assert loss.clip_epsilon.dtype == torch.float32
    assert "clip_epsilon" not in dict(loss.named_parameters())


def test_the_bound_is_saved_with_the_loss():
    loss, other = loss_by_hand(clip_epsilon=0.05), loss_by_hand()
    other.load_state_dict(loss.state_dict())
    assert other.clip_epsilon.item() == pytest.approx(0.05)


def test_a_compiled_loss_sees_the_bound_without_compiling_again():
    torch._dynamo.reset()
    loss, batch, graphs = loss_by_hand(), batch_by_hand(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for epsilon in (0.2, 0.05, 0.55):
        loss.clip_epsilon.fill_(epsilon)
        assert compiled(batch)["clip_fraction"].item() == pytest.approx({0.2: 0.8, 0.05: 1.0, 0.55: 0.0}[epsilon])
    assert len(graphs) == 1


# --- against TorchRL's ---


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("env", [custom_env, cartpole])
def test_equals_torchrls_loss(env, shared, normalize):
    agent, batch = agent_and_batch(env(), shared=shared)
    twin = copy.deepcopy(agent)
    parameters = dict(twin.named_parameters())
    theirs = ClipPPOLoss(
        twin.policy,
        twin.value,
        clip_epsilon=0.1,
        loss_critic_type="l2",
        critic_coeff=0.5 * 0.7,
        entropy_coeff=0.02,
        normalize_advantage=normalize,
    )
    ours = JointClipPPOLoss(
        agent, clip_epsilon=0.1, critic_coeff=0.7, entropy_coeff=0.02, normalize_advantage=normalize
    )
    losses, found = gradients(ours, batch, dict(agent.named_parameters()))
    expected, gradient = gradients(theirs, batch.clone(), parameters)
    assert 0.05 < losses["clip_fraction"] < 0.95
    pairs = {"loss_actor": "loss_objective", "clip_fraction": "clip_fraction"}
    for key in ("loss_actor", "loss_critic", "loss_entropy", "entropy", "clip_fraction"):
        other = pairs.get(key, key)
        assert losses[key].item() == pytest.approx(expected[other].item(), rel=1e-5, abs=1e-6), key
    assert_close(found, gradient, 1e-5)


# --- one pass of the encoder ---


@pytest.mark.parametrize("shared", [True, False])
def test_the_encoder_runs_once(shared):
    agent, batch = agent_and_batch(custom_env(), shared=shared)
    actor, _, critic, _ = agent._parts
    seen = [rows_seen(part.module) for part in ([actor] if shared else [actor, critic])]
    JointClipPPOLoss(agent)(batch)
    assert seen == [[160]] * len(seen)


# --- the collecting policy itself ---


def test_the_collecting_policy_is_not_clipped():
    agent, rollout = agent_and_rollout(custom_env())
    batch = RolloutAdvantage(agent)(rollout).reshape(-1)
    losses = JointClipPPOLoss(agent, normalize_advantage=False)(batch)
    assert losses["clip_fraction"] == 0
    assert losses["kl"].item() == pytest.approx(0, abs=1e-7)
    assert losses["loss_actor"].item() == pytest.approx(-batch["advantage"].mean().item(), rel=1e-5)
    perturb(agent)
    assert JointClipPPOLoss(agent)(batch)["kl"] > 1e-4


def test_missing_ends_in_the_advantages_skip_the_update():
    agent, rollout = agent_and_rollout(custom_env())
    for ends, skipped in ((most_ends(rollout) - 1, 1), (most_ends(rollout), 0)):
        batch = RolloutAdvantage(agent, episode_ends=ends)(rollout.clone()).reshape(-1)
        loss = JointClipPPOLoss(agent)
        step = OptimStep(loss, torch.optim.Adam(loss.parameters(), fused=True), "fp32")
        before = copy.deepcopy(agent.state_dict())
        assert step(batch)["skipped"] == skipped
        unchanged = all(torch.equal(entry, before[key]) for key, entry in agent.state_dict().items())
        assert unchanged == bool(skipped)


# --- what it reads ---


def test_in_keys_are_what_is_read_and_no_more():
    agent, batch = agent_and_batch(custom_env())
    loss = JointClipPPOLoss(agent)
    assert set(loss.in_keys) == {"observation", "action", "action_log_prob", "advantage", "value_target"}
    whole, selected = loss(batch), loss(batch.select(*loss.in_keys))
    assert set(whole.keys()) == set(loss.out_keys)
    assert all(torch.equal(whole[key], selected[key]) for key in loss.out_keys)
    for missing in loss.in_keys:
        with pytest.raises(KeyError, match=f'"{missing}" not found'):
            loss(batch.select(*(key for key in loss.in_keys if key != missing)))


def test_a_batch_of_any_shape_is_not_changed():
    agent, batch = agent_and_batch(custom_env())
    grid = batch.reshape(4, 40)
    before = grid.clone()
    loss = JointClipPPOLoss(agent)
    from_grid, flat = loss(grid), loss(batch)
    for key in loss.out_keys:
        torch.testing.assert_close(from_grid[key], flat[key])
    assert set(grid.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(grid[key], before[key]) for key in before.keys(True, True))


def test_the_loss_trains_the_agents_own_parameters():
    agent, _ = agent_and_rollout(custom_env(), steps=1)
    loss = JointClipPPOLoss(agent)
    assert {id(parameter) for parameter in loss.parameters()} == {id(parameter) for parameter in agent.parameters()}


@pytest.mark.parametrize("num_envs", [4, None])
def test_continuous_actions(num_envs):
    agent, rollout = agent_and_rollout(make("Pendulum-v1", num_envs=num_envs, seed=0), steps=20)
    batch = RolloutAdvantage(agent, episode_ends=0)(rollout).reshape(-1)
    losses, found = gradients(JointClipPPOLoss(agent), batch, dict(agent.named_parameters()))
    assert all(entry.isfinite() for entry in losses.values())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    assert losses["kl"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_the_loss_is_fp32_arithmetic_on_what_the_networks_return(dtype):
    agent, batch = agent_and_batch(custom_env())
    batch["value_target"] += 1e5  # FP16 ends at 65,504
    loss = JointClipPPOLoss(agent, normalize_advantage=False)
    with torch.autocast("cpu", dtype=dtype):
        losses = loss(batch)
        distribution, value = agent.distribution_and_value(batch)
    assert all(entry.dtype == torch.float32 and entry.isfinite() for entry in losses.values())
    log_prob = distribution.logits.double().log_softmax(-1).gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
    ratio, advantage = (log_prob - batch["action_log_prob"].double()).exp(), batch["advantage"].squeeze(-1).double()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    assert losses["loss_actor"].item() == pytest.approx(-gain.mean().item(), rel=1e-5)
    expected = 0.25 * (value.double() - batch["value_target"].double()).square().mean().item()
    assert losses["loss_critic"].item() == pytest.approx(expected, rel=1e-6)
    # It matters: in FP32 throughout the loss is another.
    assert loss(batch)["loss_actor"] != losses["loss_actor"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_epsilon": 0.0}, "clip_epsilon must be > 0; got 0.0"),
        ({"clip_epsilon": math.nan}, "clip_epsilon must be > 0; got nan"),
        ({"critic_coeff": -1.0}, "coefficients must be >= 0; got critic_coeff=-1.0"),
        ({"entropy_coeff": -1.0}, "coefficients must be >= 0; .*entropy_coeff=-1.0"),
        ({"entropy_coeff": math.nan}, "coefficients must be >= 0; .*entropy_coeff=nan"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loss_by_hand(**options)


# --- compiled ---


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_compiled_equals_eager(normalize):
    agent, batch = agent_and_batch(custom_env())
    loss = JointClipPPOLoss(agent, normalize_advantage=normalize)
    parameters = dict(agent.named_parameters())
    eager, expected = gradients(loss, batch, parameters)
    torch._dynamo.reset()
    compiled, found = gradients(torch.compile(loss, fullgraph=True), batch, parameters)
    for key in ("loss_actor", "loss_critic", "loss_entropy"):
        assert compiled[key].item() == pytest.approx(eager[key].item(), rel=1e-5, abs=1e-6), key
    assert_close(found, expected, 1e-5)
