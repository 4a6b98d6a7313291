"""`OptimStep(compile=True)`: the losses, gradients and steps of eager mode, as one graph."""

import copy
import functools

import pytest
import torch
from losses import INF, NAN, Loss, adam, bits, by_key, data, dqn, regression, target_bits, transitions, two_losses
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import A2CLoss, HardUpdate, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE

from fp8rl_torchrl import ActorCritic, OptimStep, Precision
from fp8rl_torchrl.envs import make
from fp8rl_torchrl.objectives import JointClipPPOLoss, ReplayedActorCriticLoss, RolloutA2CLoss, RolloutAdvantage
from fp8rl_torchrl.training.flat import FlatParameter

FP32 = 1e-5
BF16 = 0.03  # an eager graph rounds every intermediate to bfloat16, eps 2^-8; a fused kernel does not


@pytest.fixture
def traced_only(monkeypatch):
    """Trace and differentiate the graph as a whole, but run it on eager kernels: nothing is compiled for long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture(autouse=True)
def _own_compiler():
    torch._dynamo.reset()


def agent_and_rollout(env_name="CustomEnv", steps=16, num_envs=6):
    torch.manual_seed(0)
    env = make(env_name, num_envs=num_envs, seed=0, **({"max_steps": 7} if env_name == "CustomEnv" else {}))
    agent = ActorCritic.for_env(env, hidden=(16, 16))
    rollout = env.rollout(steps, agent.policy, break_when_any_done=False).detach()
    torch.manual_seed(1)
    for parameter in agent.parameters():  # so that the ratio to the collecting policy is not 1
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return agent, rollout


def a2c(**options):
    agent, rollout = agent_and_rollout()
    return RolloutA2CLoss(agent, entropy_coeff=0.1, normalize_advantage=True, **options), rollout


def ppo():
    agent, rollout = agent_and_rollout()
    batch = RolloutAdvantage(agent)(rollout).reshape(-1)[:64]
    return JointClipPPOLoss(agent, entropy_coeff=0.1), batch


def replayed():
    agent, rollout = agent_and_rollout()
    return ReplayedActorCriticLoss(agent, entropy_coeff=0.1), rollout.reshape(-1)


OURS = {"a2c": a2c, "a2c, ends known": lambda: a2c(episode_ends=3), "ppo": ppo, "replayed": replayed}


def losses_and_gradients(loss, batch, precision, compile):
    """Of one call that is compiled where it should be; nothing is stepped."""
    step = OptimStep(loss, adam(loss.parameters()), precision, compile=compile)
    for _ in range(2):  # the first one checks, in eager mode
        outputs, finite, gradients = step._gradients(loss, batch, {"loss": torch.ones(())})
    assert finite["loss"]
    names = [name for name, _ in loss.named_parameters()]
    assert len(names) == len(gradients["loss"])
    return outputs, dict(zip(names, gradients["loss"], strict=True))


def assert_close(found, expected, bound):
    assert set(found) == set(expected)
    for key, entry in expected.items():
        assert (found[key] is None) == (entry is None), key
        if entry is not None:
            size = max(entry.norm().item(), 1e-6 / bound)  # what is as small as rounding is not compared
            assert (found[key] - entry).norm() <= bound * size, (key, (found[key] - entry).norm() / size)


def compare(build, precision, bound):
    loss, batch = build()
    eager = losses_and_gradients(loss, batch, precision, compile=False)
    compiled = losses_and_gradients(loss, batch, precision, compile=True)
    assert any(each is not None and each.norm() > 1e-3 for each in eager[1].values())
    for found, expected in zip(compiled, eager, strict=True):
        assert_close(found, expected, bound)


# ------------------------------------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_losses_are_one_graph(name, precision, traced_only):
    compare(OURS[name], precision, FP32 if precision == "fp32" else BF16)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", FP32), ("bf16", BF16)])
def test_compiled_they_are_the_eager_ones(name, precision, bound):
    compare(OURS[name], precision, bound)


def test_a_changed_gradient_would_be_noticed():
    """Negative twin: with another weight of one loss term the comparison fails."""
    loss, batch = a2c()
    expected = losses_and_gradients(loss, batch, "fp32", compile=False)
    loss.entropy_coeff *= 1.01
    found = losses_and_gradients(loss, batch, "fp32", compile=False)
    with pytest.raises(AssertionError):
        assert_close(found[1], expected[1], FP32)


# -------------------------------------------------------------------------------------------------- TorchRL's own


def torchrl_a2c():
    torch.manual_seed(0)
    agent, rollout = agent_and_rollout("CustomEnv")
    GAE(gamma=0.99, lmbda=0.95, value_network=agent.value)(rollout)
    return A2CLoss(agent.policy, agent.value, loss_critic_type="l2"), rollout.reshape(-1)


def torchrl_dqn():
    return dqn(), transitions()


def torchrl_sac():
    torch.manual_seed(0)
    net = nn.Sequential(MLP(3, 2, num_cells=[8]), NormalParamExtractor())
    spec = Bounded(-1, 1, shape=(1,))
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=TanhNormal,
    )
    critic = ValueOperator(MLP(4, 1, num_cells=[8]), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, target_entropy=-1.0, delay_qvalue=False, loss_function="l2")
    batch = transitions()
    batch["action"] = torch.rand(8, 1) * 1.8 - 0.9
    return loss, batch


TORCHRL = {"A2CLoss": torchrl_a2c, "DQNLoss": torchrl_dqn, "SACLoss": torchrl_sac}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHRL)
@torch._inductor.config.patch(fallback_random=True)  # what a loss samples is drawn from the generator of eager mode
def test_torchrls_own_losses_compiled(name):
    loss, batch = TORCHRL[name]()
    found = []
    for compile in (False, True):
        step = OptimStep(loss, adam(loss.parameters()), "fp32", compile=compile)
        for _ in range(2):
            torch.manual_seed(3)
            outputs, _, gradients = step._gradients(loss, batch, {"loss": torch.ones(())})
        found.append((outputs, dict(enumerate(gradients["loss"]))))
    for compiled, eager in zip(found[1], found[0], strict=True):
        assert_close(compiled, eager, FP32)


@pytest.mark.parametrize("compile", [False, True])
def test_what_a_loss_writes_into_its_batch_arrives(compile, traced_only):
    """Such as the TD errors from which a prioritized replay buffer takes its priorities, at every call anew."""

    def function(model, batch):
        error = model(batch["x"]).float() - batch["y"]
        batch["td_error"] = error.detach().abs().sum(-1)
        batch["nested", "prediction"] = error  # with its history
        return error.square().mean()

    loss = Loss(nn.Linear(3, 2), function)
    step = OptimStep(loss, adam(loss.parameters(), lr=0.1), "fp32", compile=compile)
    batch = data()
    x, before = batch["x"], None
    for _ in range(4):
        with torch.no_grad():
            expected = (loss.model(batch["x"]) - batch["y"]).abs().sum(-1)
        step(batch)
        assert torch.allclose(batch["td_error"], expected, rtol=1e-5)
        assert batch["nested", "prediction"].shape == (16, 2)
        assert before is None or not torch.equal(batch["td_error"], before)
        before = batch["td_error"]
    assert batch["x"] is x


# ---------------------------------------------------------------------------------------------------- whole updates


def trained(build, batches, compile, precision="fp32", optimizer=None, **options):
    """A loss after some updates, its step, and what each update returned."""
    loss = build()
    optimizer = optimizer(loss) if optimizer else adam([FlatParameter(loss.parameters())], lr=0.01)
    step = OptimStep(loss, optimizer, precision, compile=compile, **options)
    return loss, step, [step(batch) for batch in batches]


def assert_same_course(build, batches, bound=FP32, **options):
    eager, eager_step, expected = trained(build, batches, False, **options)
    compiled, compiled_step, found = trained(build, batches, True, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours.keys()) == set(theirs.keys())
        for key in theirs.keys():
            assert torch.allclose(ours[key], theirs[key], rtol=bound, atol=1e-7, equal_nan=True), key
    assert compiled_step.updates == eager_step.updates
    assert compiled_step.skipped_steps == eager_step.skipped_steps
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=10 * bound, atol=1e-6)
    return compiled, compiled_step


def test_updates_follow_the_eager_ones(traced_only):
    _, step = assert_same_course(
        regression,
        [data(seed=seed) for seed in range(20)],
        max_grad_norm=0.5,
        lr_schedule=lambda done: (1 - done / 40).clamp(min=0.1),
    )
    assert step.updates == 20
    assert step.optimizers["loss"].param_groups[0]["lr"] == pytest.approx(0.01 * (1 - 19 / 40))


def with_overflows():
    """Batches of which the third is infinite and the sixth is not a number."""
    batches = [data(seed=seed) for seed in range(8)]
    batches[2]["y"][0, 0], batches[5]["y"][0, 0] = INF, NAN
    return batches


def test_fp16_skips_what_overflows(traced_only):
    _, step = assert_same_course(
        regression, with_overflows(), bound=0.02, precision=Precision("fp16", init_scale=64.0, growth_interval=3)
    )
    assert (int(step.updates), int(step.skipped_steps)) == (6, 2)
    assert step.scalers["loss"].get_scale() != 64.0


@pytest.mark.slow
def test_compiled_fp16_skips_what_overflows():
    _, step = assert_same_course(
        regression, with_overflows(), bound=0.02, precision=Precision("fp16", init_scale=64.0, growth_interval=3)
    )
    assert (int(step.updates), int(step.skipped_steps)) == (6, 2)


def test_a_scale_too_large_is_halved_until_it_fits(traced_only):
    precision = Precision("fp16", init_scale=2.0**24)
    _, step = assert_same_course(regression, [data(seed=1)] * 12, bound=0.02, precision=precision)
    assert step.skipped_steps > 0
    assert step.updates > 0
    assert step.scalers["loss"].get_scale() == 2.0**24 * 0.5 ** int(step.skipped_steps)


def test_several_optimizers_skip_each_for_itself(traced_only):
    batches = [TensorDict(x=torch.tensor(pair)) for pair in ([1.0, 2.0], [3.0, -1.0], [1.0, INF], [2.0, 2.0])]
    loss, step = assert_same_course(two_losses, batches, optimizer=functools.partial(by_key, lr=0.1))
    assert (int(step.updates), int(step.skipped_steps)) == (3, 1)
    assert not torch.equal(loss.model["a"].weight, loss.model["b"].weight)


@pytest.mark.slow
def test_several_optimizers_compiled():
    batches = [TensorDict(x=torch.tensor(pair)) for pair in ([1.0, 2.0], [3.0, -1.0], [1.0, INF], [2.0, 2.0])]
    assert_same_course(two_losses, batches, optimizer=functools.partial(by_key, lr=0.1))


def test_gradients_accumulate(traced_only):
    _, step = assert_same_course(regression, [data(seed=seed) for seed in range(9)], accumulate=3)
    assert step.updates == 3


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_target_networks_move(updater, traced_only):
    options = {"tau": 0.1} if updater is SoftUpdate else {"value_network_update_interval": 2}
    batches = [transitions(0), transitions(1), transitions(2, reward=INF), transitions(3)]
    after = []
    for compile in (False, True):
        loss = dqn()
        step = OptimStep(
            loss, adam(loss.parameters(), lr=0.1), "fp32", target_updater=updater(loss, **options), compile=compile
        )
        first, trail = target_bits(loss), []
        for batch in batches:
            step(batch)
            trail.append(target_bits(loss))
        assert trail[-1] != first
        assert trail[2] == trail[1], "a skipped update moves nothing"
        after.append(torch.cat([p.flatten() for p in loss.target_value_network_params.flatten_keys(".").values()]))
        assert (int(step.updates), int(step.skipped_steps)) == (3, 1)
    assert torch.allclose(after[1], after[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- compiling


def test_the_first_call_is_eager_and_checks(monkeypatch):
    compiled = []

    def counting(function, **options):
        assert options["fullgraph"]
        return lambda *args: (compiled.append(1), function(*args))[1]

    monkeypatch.setattr(torch, "compile", counting)
    loss = regression()
    step = OptimStep(loss, adam(loss.parameters()), "fp32", compile=True)
    for count in range(3):
        step(data())
        assert len(compiled) == count
    step = OptimStep(loss, adam(loss.parameters()), "fp32")
    step(data())
    step(data())
    assert len(compiled) == 2, "without compile nothing is compiled"

    nothing = Loss(nn.Linear(1, 1), lambda model, batch: batch["x"].sum())
    unreached = OptimStep(nothing, adam(nothing.parameters()), "fp32", compile=True)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        unreached(data())


def test_a_new_shape_of_the_batch_is_compiled_and_right(traced_only):
    sizes = [16, 16, 16, 5, 5, 33, 16]
    assert_same_course(regression, [data(rows, seed) for seed, rows in enumerate(sizes)])


@pytest.mark.slow
def test_a_new_shape_of_the_batch_compiled():
    assert_same_course(regression, [data(rows, seed) for seed, rows in enumerate([16, 16, 16, 5, 5, 33, 16])])


def test_many_steps_in_one_process_do_not_meet_the_recompile_limit(traced_only):
    """Each has code of its own, so what others have compiled does not count: 12 are more than the limit of 8."""
    assert torch._dynamo.config.recompile_limit <= 12
    for width in range(1, 13):
        torch.manual_seed(0)
        loss = Loss(nn.Linear(3, width), lambda model, batch: model(batch["x"]).float().square().mean())
        step = OptimStep(loss, adam(loss.parameters(), lr=0.01), "fp32", compile=True)
        torch._dynamo.utils.counters.clear()
        before, first, second = bits(loss.state_dict()), step(data())["loss"], step(data())["loss"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled, not run eagerly"
        assert second < first
        assert bits(loss.state_dict()) != before


@pytest.mark.slow
def test_many_steps_compiled():
    for width in range(1, 13):
        loss = Loss(nn.Linear(3, width), lambda model, batch: model(batch["x"]).float().square().mean())
        step = OptimStep(loss, adam(loss.parameters(), lr=0.01), "fp32", compile=True)
        first = [step(data())["loss"] for _ in range(3)]
        assert first[2] < first[1] < first[0]


def test_a_restored_compiled_step_goes_on(traced_only):
    batches = [data(seed=seed) for seed in range(6)]
    whole, step, _ = trained(regression, batches, True)
    part, half, _ = trained(regression, batches[:3], True)
    saved = copy.deepcopy([part.state_dict(), half.state_dict()])
    resumed, again, _ = trained(regression, [data(seed=50)] * 2, True)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for batch in batches[3:]:
        again(batch)
    assert bits([resumed.state_dict(), again.state_dict()]) == bits([whole.state_dict(), step.state_dict()])
