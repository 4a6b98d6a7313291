"""The categorical distribution: against float64, at the edges of float32, and inside a policy."""

import pytest
import torch
from actor_critics import batch, enliven
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions
from torchrl.envs import ExplorationType, set_exploration_type

from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.categorical import Categorical

INF = float("inf")
# The largest number below 1 that torch.rand returns in float32.
ALMOST_ONE = 1 - 2**-24
LOGITS = {
    "one outcome": [[0.7]],
    "two": [[0.3, -0.2], [5.0, -5.0]],
    "many": torch.linspace(-3, 3, 18).repeat(3, 4, 1),
    "no batch": [1.0, 2.0, 0.5],
    "far apart": [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]],
    "impossible outcome": [[0.5, -INF, 1.0], [-INF, 0.0, 0.0]],
}


def double(logits):
    return distributions.Categorical(logits=logits.double(), validate_args=False)


def noise_of(monkeypatch, number):
    """Let every uniform number be ``number``."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(tuple(shape), number, **options))


# --- samples ---


def chi_square(samples, probabilities):
    """The sum over outcomes of (observed - expected)² / expected."""
    observed = torch.bincount(samples, minlength=len(probabilities)).double()
    expected = len(samples) * probabilities
    return ((observed - expected).square() / expected).sum().item()


def test_samples_follow_the_distribution():
    # The 1 - 1e-6 quantile of chi-square with 7 degrees of freedom is 40.5; the seed is fixed.
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.1, 1.5])
    torch.manual_seed(0)
    samples = Categorical(logits=logits).sample([100_000])
    assert chi_square(samples, double(logits).probs) < 40.5
    # Two wrong distributions are rejected: one with a logit 0.1 larger, and one off by an outcome.
    wrong = logits.clone()
    wrong[3] += 0.1
    assert chi_square(samples, double(wrong).probs) > 40.5
    assert chi_square(samples.flip(0).sub(1).remainder(8), double(logits).probs) > 40.5


def test_samples_of_a_batch_are_independent():
    torch.manual_seed(0)
    samples = Categorical(logits=torch.zeros(2, 2)).sample([20_000])
    pairs = 2 * samples[:, 0] + samples[:, 1]
    # The 1 - 1e-6 quantile of chi-square with 3 degrees of freedom is 30.7.
    assert chi_square(pairs, torch.full((4,), 0.25).double()) < 30.7
    assert chi_square(3 * samples[:, 0], torch.full((4,), 0.25).double()) > 30.7  # equal, not independent


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("kind", LOGITS)
def test_shape_dtype_and_range_of_samples(kind, sample_shape):
    logits = torch.as_tensor(LOGITS[kind])
    for shape in (torch.Size(sample_shape), sample_shape):
        samples = Categorical(logits=logits, validate_args=False).sample(shape)
        assert (samples.shape, samples.dtype) == ((*sample_shape, *logits.shape[:-1]), torch.int64)
        assert ((samples >= 0) & (samples < logits.shape[-1])).all()
        assert not samples.requires_grad


def test_by_hand(monkeypatch):
    # Cumulative: 1/4, 3/4, 1, all exact; an outcome owns the half-open interval up to its own.
    distribution = Categorical(probs=torch.tensor([0.25, 0.5, 0.25]))
    for number, outcome in [(0, 0), (0.2499, 0), (0.25, 1), (0.7499, 1), (0.75, 2), (ALMOST_ONE, 2)]:
        noise_of(monkeypatch, number)
        assert distribution.sample().item() == outcome, number


@pytest.mark.parametrize("number", [0.0, ALMOST_ONE])
@settings(max_examples=200)
@given(data=st.data())
def test_no_sample_is_impossible(number, data):
    """Whatever the sum of the probabilities rounds to, and whichever outcomes have probability 0."""
    rows = st.lists(st.one_of(st.floats(-30, 30, width=32), st.just(-INF)), min_size=2, max_size=18)
    logits = torch.tensor(data.draw(rows.filter(lambda row: max(row) > -INF)))
    distribution = Categorical(logits=logits, validate_args=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        noise_of(monkeypatch, number)
        sample = distribution.sample()
    assert 0 <= sample < len(logits)
    assert distribution.probs[sample] > 0
    assert distribution.log_prob(sample).isfinite()


def test_the_sum_does_round_below_and_above_one(monkeypatch):
    """Negative twin: comparing with unscaled noise would sample the impossible last outcome."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(1000, 5)
    logits[:, -1] = -INF
    distribution = Categorical(logits=logits, validate_args=False)
    sums = distribution.probs.cumsum(-1)[:, -1]
    assert (sums < 1).any()
    assert (sums > 1).any()
    unscaled = (distribution.probs.cumsum(-1)[:, :-1] <= ALMOST_ONE).sum(-1)
    assert (unscaled == 4).any()
    noise_of(monkeypatch, ALMOST_ONE)
    assert distribution.sample().max() == 3


def test_a_certain_outcome_is_always_sampled():
    distribution = Categorical(logits=torch.tensor([-1e4, 1e4, -INF]), validate_args=False)
    assert distribution.sample([10_000]).unique().tolist() == [1]


# --- log-probability and entropy ---


@pytest.mark.parametrize("kind", LOGITS)
def test_log_prob_and_entropy_equal_float64(kind):
    logits = torch.as_tensor(LOGITS[kind])
    ours, exact = Categorical(logits=logits, validate_args=False), double(logits)
    value = torch.arange(logits.shape[-1]).reshape(-1, *[1] * (logits.ndim - 1)).expand(-1, *logits.shape[:-1])
    # Subtracting the log-sum rounds to half a unit in the last place of the larger logit.
    bound = 4 * 2**-24 * max(1.0, logits[logits.isfinite()].abs().max().item())
    torch.testing.assert_close(ours.log_prob(value).double(), exact.log_prob(value), rtol=2**-22, atol=bound)
    torch.testing.assert_close(ours.entropy().double(), exact.entropy(), rtol=2**-20, atol=2**-20)
    assert ours.log_prob(value).dtype == ours.entropy().dtype == torch.float32
    assert ours.entropy().shape == logits.shape[:-1]


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("quantity", ["log_prob", "entropy"])
def test_gradients_equal_float64(kind, quantity):
    logits = torch.as_tensor(LOGITS[kind])
    weight = torch.linspace(-1, 1, logits[..., 0].numel()).reshape(logits.shape[:-1])
    gradients = []
    for dtype, distribution in ((torch.float32, Categorical), (torch.float64, distributions.Categorical)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        made = distribution(logits=leaf, validate_args=False)
        value = made.log_prob(logits.argmax(-1)) if quantity == "log_prob" else made.entropy()
        gradients.append(torch.autograd.grad((weight * value).sum(), leaf)[0].double())
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_entropys_gradient_stays_finite_under_a_loss_scale():
    """Negative twin: the parent class multiplies an impossible outcome's most negative number by the scale."""
    finite = []
    for distribution in (Categorical, distributions.Categorical):
        logits = torch.tensor([-INF, 0.0, 1.0], requires_grad=True)
        entropy = distribution(logits=logits, validate_args=False).entropy()
        (gradient,) = torch.autograd.grad(2.0**16 * entropy, logits)
        finite.append(gradient.isfinite().all().item())
    assert finite == [True, False]


def test_log_prob_and_its_gradient_by_hand():
    # log(1/4) and log(3/4); the gradient is one-hot minus probabilities.
    logits = torch.tensor([0.0, torch.tensor(3.0).log()], requires_grad=True)
    log_prob = Categorical(logits=logits).log_prob(torch.tensor(1))
    assert log_prob.item() == pytest.approx(-0.2876821, abs=1e-7)
    (gradient,) = torch.autograd.grad(log_prob, logits)
    torch.testing.assert_close(gradient, torch.tensor([-0.25, 0.25]))
    assert Categorical(logits=logits).log_prob(torch.tensor(0)).item() == pytest.approx(-1.3862944, abs=1e-7)


@settings(max_examples=100)
@given(
    rows=st.integers(2, 18).flatmap(
        lambda n: st.lists(st.lists(st.floats(-50, 50, width=32), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_any_logits_equal_float64(rows):
    logits = torch.tensor(rows)
    ours, exact = Categorical(logits=logits), double(logits)
    value = torch.arange(logits.shape[-1]).unsqueeze(-1).expand(-1, len(logits))
    torch.testing.assert_close(ours.log_prob(value).double(), exact.log_prob(value), rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(ours.entropy().double(), exact.entropy(), rtol=1e-5, atol=1e-5)


def test_values_of_another_shape_are_broadcast_as_the_parents_are():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for shape in ((), (4,), (3, 4), (2, 3, 4), (7, 1, 1)):
        value = torch.randint(5, shape, generator=torch.Generator().manual_seed(1))
        log_prob = Categorical(logits=logits).log_prob(value)
        assert torch.equal(log_prob, Categorical(logits=logits).log_prob(value.expand(log_prob.shape))), shape
        torch.testing.assert_close(log_prob, distributions.Categorical(logits=logits).log_prob(value))


@pytest.mark.parametrize("value", [-1, 3, 100])
def test_what_is_no_outcome_has_probability_zero_or_is_refused(value):
    logits = torch.zeros(2, 3)
    values = torch.tensor([value, 0])
    log_prob = Categorical(logits=logits, validate_args=False).log_prob(values)
    assert log_prob.tolist() == [-INF, pytest.approx(-1.0986123)]
    with pytest.raises(ValueError, match="within the support"):
        Categorical(logits=logits, validate_args=True).log_prob(values)


def test_a_nan_logit_is_not_hidden():
    distribution = Categorical(logits=torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]), validate_args=False)
    for result in (distribution.log_prob(torch.tensor([1, 1])), distribution.entropy()):
        assert result.isnan().tolist() == [True, False]


# --- as a distribution of torch and of TorchRL ---


def test_expand_keeps_the_class():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    expanded = Categorical(logits=logits).expand([4, 1])
    assert type(expanded) is Categorical
    assert expanded.batch_shape == (4, 1)
    assert expanded.sample([2]).shape == (2, 4, 1)
    assert torch.equal(expanded.entropy(), Categorical(logits=logits).entropy().expand(4, 1))


def test_probabilities_give_the_same_distribution_as_logits():
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    ours, theirs = Categorical(probs=probabilities), distributions.Categorical(probs=probabilities)
    assert torch.equal(ours.log_prob(torch.tensor([2, 0])), theirs.log_prob(torch.tensor([2, 0])))
    assert torch.equal(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode, torch.tensor([2, 0]))


@pytest.mark.parametrize("kind", LOGITS)
def test_the_mode_is_the_likeliest_outcome(kind):
    logits = torch.as_tensor(LOGITS[kind])
    assert torch.equal(Categorical(logits=logits, validate_args=False).mode, logits.argmax(-1))


def agent():
    torch.manual_seed(0)
    return enliven(ActorCritic.for_env(CustomEnv(num_envs=4, seed=0), hidden=(16, 16)))


@pytest.mark.filterwarnings("error::UserWarning")  # TorchRL warns where it must guess what is deterministic
def test_a_policy_samples_from_it_and_takes_its_mode_when_deterministic():
    policy = agent().policy
    assert type(policy.get_dist(batch(4))) is Categorical
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        output = policy(batch(256))
    assert torch.equal(output["action"], output["logits"].argmax(-1))
    assert output["action"].unique().tolist() == [0, 1]
    sampled = policy(batch(256))
    assert not torch.equal(sampled["action"], output["action"])
    exact = double(sampled["logits"]).log_prob(sampled["action"])
    torch.testing.assert_close(sampled["action_log_prob"].double(), exact, rtol=0, atol=1e-6)


def test_a_policy_is_seeded_by_torch():
    policy = agent().policy
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(policy(batch(64))["action"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.slow
@pytest.mark.parametrize("outcomes", [1, 2, 18])
def test_compiled_equals_eager(outcomes):
    def draw(logits):
        distribution = Categorical(logits=logits, validate_args=False)
        sample = distribution.sample()
        return sample, distribution.log_prob(sample), distribution.entropy()

    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, options={"fallback_random": True})
    logits = torch.randn(512, outcomes, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (draw, compiled):
        torch.manual_seed(3)
        results.append(function(logits))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][0].unique().numel() == outcomes
    for eager, found in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_distribution_expands():  # torch 2.11 cannot trace `expand` of any distribution
    def expanded(logits, value):
        distribution = Categorical(logits=logits, validate_args=False).expand((4, 3))
        return distribution.log_prob(value), distribution.entropy()

    torch._dynamo.reset()
    logits, value = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12).reshape(4, 3) % 2
    found = torch.compile(expanded, fullgraph=True)(logits, value)
    for ours, eager in zip(found, expanded(logits, value), strict=True):
        assert ours.shape == (4, 3)
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOGITS)
def test_compiled_equals_float64_with_its_gradients(kind):
    """Few outcomes are computed one at a time; impossible ones and values far apart stay what they are."""

    def quantities(logits, value, distribution=Categorical):
        made = distribution(logits=logits, validate_args=False)
        return made.log_prob(value), made.entropy(), made.mode

    torch._dynamo.reset()
    logits = torch.as_tensor(LOGITS[kind])
    results = []
    for function, dtype in ((torch.compile(quantities, fullgraph=True), torch.float32), (quantities, torch.float64)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        log_prob, entropy, mode = function(leaf, logits.argmax(-1))
        (gradient,) = torch.autograd.grad((log_prob + 0.7 * entropy).sum(), leaf)
        results.append([each.double() for each in (log_prob, entropy, mode, gradient)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
