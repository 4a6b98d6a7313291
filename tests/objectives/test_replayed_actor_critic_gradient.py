"""The replayed actor-critic loss against the true policy gradient, of a problem small enough to enumerate."""

import torch
from tabular import NEVER, Table, transitions

from fp8rl_torchrl.objectives.replayed_actor_critic import ReplayedActorCriticLoss

# Three states, equally frequent, and three actions; the behaviour policy takes each action COUNTS / 12 of the time, so
# that a batch with each pair as often as its count is the exact expectation over the behaviour policy.

COUNTS = torch.tensor([[1, 3, 8], [6, 3, 3], [2, 9, 1]])
REWARD = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [2.0, 0.25, -0.5]])
FOLLOWING = torch.tensor([[1, 2, 0], [2, 2, 1], [0, 1, 0]])
TERMINATED = torch.tensor([[False, False, True], [False, True, False], [True, False, False]])
GAMMA = 0.9


def small_table():
    return Table([[0.5, -1.0, 0.3], [-0.7, 0.2, 1.0], [1.5, -0.4, 0.1]], [0.5, -1.0, 2.0])


def small_batch():
    state, action = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    repeat = COUNTS.flatten()
    entries = (state, action, COUNTS / 12, REWARD, FOLLOWING, TERMINATED)
    return transitions(*(entry.flatten().repeat_interleave(repeat) for entry in entries))


def advantages(table):
    """One-step advantages [S, A] of every state and action, in float64."""
    values = table.values.detach().double()
    return REWARD.double() + GAMMA * ~TERMINATED * values[FOLLOWING] - values.unsqueeze(-1)


def true_policy_gradient(table):
    """The gradient of the mean over states of sum_a pi(a|s) A(s, a), by autograd in float64."""
    logits = table.logits.detach().double().requires_grad_()
    objective = (logits.softmax(-1) * advantages(table)).sum(-1).mean()
    return torch.autograd.grad(objective, logits)[0]


def gradients_of_the_loss(table, batch, max_weight=NEVER):
    losses = ReplayedActorCriticLoss(table, gamma=GAMMA, max_weight=max_weight, critic_coeff=1.0)(batch)
    (actor,) = torch.autograd.grad(losses["loss_actor"], table.logits)
    (critic,) = torch.autograd.grad(losses["loss_critic"], table.values)
    return actor.double(), critic.double()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def largest_weight(table):
    return (table.logits.softmax(-1) / (COUNTS / 12)).max().item()


def test_the_batch_is_the_behaviour_policy():
    batch = small_batch()
    assert batch.batch_size == (36,)
    frequency = torch.bincount(3 * batch["observation"] + batch["action"], minlength=9).reshape(3, 3) / 12
    assert torch.equal(frequency, COUNTS / 12)
    assert relative_error(COUNTS / 12, small_table().logits.softmax(-1)) > 0.5  # far from the policy that learns


def test_the_corrected_gradient_is_the_true_policy_gradient():
    table = small_table()
    actor, _ = gradients_of_the_loss(table, small_batch())
    assert relative_error(actor, -true_policy_gradient(table)) < 1e-6


def test_the_uncorrected_gradient_is_biased():
    table, batch = small_table(), small_batch()
    # Pretend that the policy collected the batch itself: every weight is then 1.
    distribution, _ = table.distribution_and_value(batch)
    batch["action_log_prob"] = distribution.log_prob(batch["action"]).detach()
    actor, _ = gradients_of_the_loss(table, batch)
    assert relative_error(actor, -true_policy_gradient(table)) > 0.5


def test_on_policy_the_uncorrected_gradient_is_right():
    # The bias is the replay's and not that of the estimator: with the behaviour policy as the policy it is gone.
    table = Table((COUNTS / 12).log(), [0.5, -1.0, 2.0])
    actor, _ = gradients_of_the_loss(table, small_batch(), max_weight=1.0)
    assert relative_error(actor, -true_policy_gradient(table)) < 1e-6


def test_the_corrected_critic_learns_the_value_of_the_policy():
    table = small_table()
    _, critic = gradients_of_the_loss(table, small_batch())
    # -E_pi[delta] per state, of a mean over three states
    expected = -(table.logits.detach().double().softmax(-1) * advantages(table)).sum(-1) / 3
    assert relative_error(critic, expected) < 1e-6


def test_truncation_above_the_largest_weight_changes_nothing():
    table = small_table()
    assert 2 < largest_weight(table) < 12
    for truncated, free in zip(
        gradients_of_the_loss(table, small_batch(), max_weight=1.001 * largest_weight(table)),
        gradients_of_the_loss(table, small_batch()),
        strict=True,
    ):
        assert torch.equal(truncated, free)


def test_truncation_below_the_largest_weight_biases():
    table = small_table()
    true = -true_policy_gradient(table)
    errors = []
    for fraction in (0.8, 0.5, 0.2):
        actor, _ = gradients_of_the_loss(table, small_batch(), max_weight=fraction * largest_weight(table))
        errors.append(relative_error(actor, true))
    assert 0.01 < errors[0] < errors[1] < errors[2]
