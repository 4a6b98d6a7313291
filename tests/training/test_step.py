"""`OptimStep`: what one update does, what a skipped one does not, and what is refused before the first."""

import copy
import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, DQNLoss, HardUpdate, SACLoss, SoftUpdate
from torchrl.trainers import OptimizationStepper, Trainer

from fp8rl_torchrl import ActorCritic, OptimStep, Precision
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


def named(precision):
    """The precision by its name; a first loss scale small enough that nothing overflows unless a test plants it."""
    return Precision(precision, init_scale=64.0)


def adam(parameters, **options):
    return torch.optim.Adam(parameters, fused=True, **options)


def descent(parameters):
    """With a learning rate of 1, minus what a parameter of 0 becomes is its gradient."""
    return torch.optim.SGD(parameters, lr=1.0, fused=True)


class Loss(nn.Module):
    """Any function of (model, batch), in FP32 after the model, as a loss module."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch):
        result = self.function(self.model, batch)
        return TensorDict(result if isinstance(result, dict) else {"loss": result}, batch_size=[])


def regression():
    torch.manual_seed(0)
    return Loss(nn.Linear(3, 2), lambda model, batch: (model(batch["x"]).float() - batch["y"]).square().mean())


def data(rows=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {"x": torch.randn(rows, 3, generator=generator), "y": torch.randn(rows, 2, generator=generator)},
        batch_size=[rows],
    )


def linear(weights=2):
    """The loss sum(w * x), whose gradient is x itself; batches choose the gradient and, through ``add``, the loss."""
    model = nn.Linear(weights, 1, bias=False)
    nn.init.zeros_(model.weight)

    def function(model, batch):
        product = (model.weight[0] * batch["x"]).sum()
        return product + batch["add"] if "add" in batch.keys() else product

    return Loss(model, function)


def gradient_of(*values, add=None):
    extra = {} if add is None else {"add": torch.tensor(float(add))}
    return TensorDict({"x": torch.tensor(values), **extra}, batch_size=[])


def bits(tree):
    """Tensors of a nested structure as bytes, so that NaN equals NaN and -0.0 does not equal 0.0."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return tree


# ---------------------------------------------------------------------------------------------------- one update


@pytest.mark.parametrize("max_norm", [None, 0.1], ids=["no clipping", "clipped to 0.1"])
def test_in_fp32_it_is_adam(max_norm):
    loss = regression()
    reference = copy.deepcopy(loss)
    step = OptimStep(loss, adam(loss.parameters(), lr=0.01), "fp32", max_grad_norm=max_norm)
    optimizer = adam(reference.parameters(), lr=0.01)
    for seed in range(5):
        expected = reference(data(seed=seed))["loss"]
        expected.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), max_norm or float("inf"))
        if max_norm:
            assert norm > max_norm, "nothing to clip: this would prove nothing"
        optimizer.step()
        optimizer.zero_grad()
        metrics = step(data(seed=seed))
        assert torch.equal(metrics["loss"], expected)
        assert torch.equal(metrics["grad_norm"], norm)
        for ours, theirs in zip(loss.parameters(), reference.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert step.updates == 5
    assert step.skipped_steps == 0


def test_the_first_adam_step_by_hand():
    loss = linear()
    OptimStep(loss, adam(loss.parameters(), lr=0.01), "fp32")(gradient_of(3.0, -0.5))
    # the first step is -lr * g / (|g| + eps): -lr * sign(g)
    assert torch.allclose(loss.model.weight, torch.tensor([[-0.01, 0.01]]), atol=1e-9)


def test_it_returns_detached_device_scalars():
    loss = regression()
    step = OptimStep(loss, adam(loss.parameters()), "fp16", max_grad_norm=1.0)
    metrics = step(data())
    assert sorted(metrics.keys()) == ["grad_norm", "loss", "loss_scale", "skipped"]
    for value in metrics.values():
        assert value.shape == ()
        assert not value.requires_grad


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_runs_under_autocast_of_its_precision(precision):
    seen = {}

    def function(model, batch):
        output = model(batch["x"])
        seen["output"] = output.dtype
        return output.float().square().mean()

    loss = Loss(nn.Linear(3, 2), function)
    OptimStep(loss, adam(loss.parameters()), precision)(data())
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    assert seen["output"] == expected
    assert not torch.is_autocast_enabled("cpu")
    assert all(p.dtype == torch.float32 for p in loss.parameters())


def test_parameters_and_moments_stay_float32_in_fp16():
    loss = regression()
    step = OptimStep(loss, adam(loss.parameters()), "fp16")
    step(data())
    for moments in step.optimizers["loss"].state.values():
        assert {name: value.dtype for name, value in moments.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), torch.float32
        )


def test_several_losses_of_one_optimizer_are_summed():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    loss = Loss(
        model,
        lambda model, batch: {
            "loss_left": 2 * model.weight[0, 0],
            "loss_right": 3 * model.weight.sum(),
            "other": model.weight.sum() * 100,  # not a loss: no gradient
        },
    )
    metrics = OptimStep(loss, descent(loss.parameters()), "fp32")(TensorDict())
    assert model.weight.tolist() == [[-5.0, -3.0]]
    assert set(metrics.keys()) == {"loss_left", "loss_right", "other", "grad_norm", "skipped", "loss_scale"}


def test_a_loss_that_is_not_float32_is_warned_about_once():
    loss = Loss(nn.Linear(3, 2), lambda model, batch: model(batch["x"]).square().mean())
    step = OptimStep(loss, adam(loss.parameters()), "bf16")
    loss.function = lambda model, batch: model(batch["x"]).mean()
    with pytest.warns(UserWarning, match=r"'loss' was computed in torch.bfloat16: end the networks in float32"):
        step(data())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(data())


def test_frozen_parameters_of_the_optimizer_are_left_alone():
    loss = regression()
    loss.model.bias.requires_grad_(False)
    before = loss.model.bias.clone()
    step = OptimStep(loss, adam(loss.parameters(), lr=0.1), "fp32")
    step(data())
    assert torch.equal(loss.model.bias, before)
    loss.model.bias.requires_grad_(True)  # thawed: trains from now on
    step(data())
    assert not torch.equal(loss.model.bias, before)


# ------------------------------------------------------------------------------------------------ the loss scaler


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_scaler_is_live_in_fp16_and_present_but_disabled_otherwise(precision):
    loss = linear()
    step = OptimStep(loss, adam(loss.parameters()), precision)
    metrics = step(gradient_of(1.0, 1.0))
    assert list(step.scalers) == ["loss"]
    assert step.scalers["loss"].is_enabled() == (precision == "fp16")
    assert metrics["loss_scale"] == (2.0**16 if precision == "fp16" else 1.0)


SMALL = 1e-8  # under half of FP16's smallest number, 5.96e-8: rounds to zero; times 2^16 it is a normal FP16 number


def weight_gradient(precision, *, scaled):
    """The weight gradient of ``SMALL * sum(W x)``, as a gradient step from W = 0 shows it."""
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    loss = Loss(model, lambda model, batch: (model(batch["x"]).float() * SMALL).sum())
    step = OptimStep(loss, descent(loss.parameters()), precision)
    if not scaled:
        step.scalers["loss"] = torch.amp.GradScaler("cpu", enabled=False)
    metrics = step(data())
    assert metrics["skipped"] == 0
    return -model.weight.detach()


def test_fp16_keeps_small_gradients_with_the_scaler_and_loses_them_without():
    exact = weight_gradient("fp32", scaled=False)
    assert exact.abs().min() > 0
    # by hand: SMALL * sum over rows of x, the same for both outputs
    assert torch.allclose(exact, SMALL * data()["x"].sum(0).expand(2, 3), rtol=1e-5)
    kept = weight_gradient("fp16", scaled=True)
    assert torch.allclose(kept, exact, rtol=2e-3, atol=0)
    lost = weight_gradient("fp16", scaled=False)
    assert torch.equal(lost, torch.zeros(2, 3))


def test_initial_scale_growth_and_backoff():
    loss = linear()
    step = OptimStep(loss, adam(loss.parameters()), Precision("fp16", init_scale=8.0, growth_interval=3))
    clean, overflow = gradient_of(1.0, 1.0), gradient_of(float("inf"), 1.0)
    batches = [clean] * 7 + [overflow] + [clean] * 4
    scales = [step(batch)["loss_scale"].item() for batch in batches]
    # three clean updates double it; an overflow halves it and the count of clean ones begins again
    assert scales == [8, 8, 8, 16, 16, 16, 32, 32, 16, 16, 16, 32]
    assert step.updates == 11
    assert step.skipped_steps == 1


def clipped_update(precision, *, max_norm, clip_first=False):
    """The update from 0 by the gradient (3, 4), of norm 5."""
    loss = linear()
    step = OptimStep(loss, descent(loss.parameters()), precision, max_grad_norm=None if clip_first else max_norm)
    if clip_first:  # the wrong order: clips the gradient before it is unscaled

        def unscale(optimizer, right=step.scalers["loss"].unscale_):
            nn.utils.clip_grad_norm_(loss.parameters(), max_norm)
            right(optimizer)

        step.scalers["loss"].unscale_ = unscale
    metrics = step(gradient_of(3.0, 4.0))
    return -loss.model.weight.detach()[0], metrics["grad_norm"].item()


@pytest.mark.parametrize(("max_norm", "expected"), [(0.5, (0.3, 0.4)), (100.0, (3.0, 4.0))])
def test_gradients_are_unscaled_before_they_are_clipped(max_norm, expected):
    precision = Precision("fp16", init_scale=1024.0)
    update, norm = clipped_update(precision, max_norm=max_norm)
    assert torch.allclose(update, torch.tensor(expected), rtol=1e-5)
    assert norm == 5.0
    wrong, _ = clipped_update(precision, max_norm=max_norm, clip_first=True)
    assert torch.allclose(wrong, torch.tensor([0.6, 0.8]) * max_norm / 1024, rtol=1e-4)
    assert not torch.allclose(wrong, update, rtol=0.1)


# ---------------------------------------------------------------------------------------------- skipped updates

INF, NAN = float("inf"), float("nan")
BAD = {
    "infinite loss": gradient_of(1.0, 1.0, add=INF),
    "NaN loss": gradient_of(1.0, 1.0, add=NAN),
    "infinite gradient": gradient_of(INF, 1.0),
    "NaN gradient": gradient_of(NAN, 1.0),
}


class OnlyGradient(torch.autograd.Function):
    """The sum of the weights forward, the second argument backward: a finite loss with any gradient."""

    @staticmethod
    def forward(ctx, weight, gradient):
        ctx.save_for_backward(gradient)
        return weight.sum()

    @staticmethod
    def backward(ctx, upstream):
        return (upstream * ctx.saved_tensors[0]).unsqueeze(0), None


def planted():
    """Loss and gradient chosen separately."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    return Loss(
        model,
        lambda model, batch: (
            OnlyGradient.apply(model.weight, batch["x"]) + (batch["add"] if "add" in batch.keys() else 0.0)
        ),
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", BAD)
def test_a_non_finite_loss_or_gradient_skips_the_update(kind, precision):
    loss = planted()
    step = OptimStep(
        loss, adam(loss.parameters(), lr=0.1), precision, max_grad_norm=0.5, lr_schedule=lambda done: 1 / (1 + done)
    )
    for values in ((1.0, 2.0), (0.5, -1.0)):
        assert step(gradient_of(*values))["skipped"] == 0
    optimizer = step.optimizers["loss"]
    before = bits([loss.state_dict(), optimizer.state_dict()])
    scale = step.scalers["loss"].get_scale()

    metrics = step(BAD[kind])
    assert metrics["skipped"] == 1
    in_loss = kind.endswith("loss")
    assert torch.isfinite(metrics["loss"]) == (not in_loss)
    assert torch.isfinite(metrics["grad_norm"]) == in_loss

    # The learning rate of the group is that of the next update, which the skipped one was to be.
    optimizer.param_groups[0]["lr"].fill_(0.1 / 2)
    assert bits([loss.state_dict(), optimizer.state_dict()]) == before
    assert step.updates == 2
    assert step.skipped_steps == 1
    # the scale follows the gradients alone: they, not the loss, are what it scales
    assert step.scalers["loss"].get_scale() == (scale / 2 if precision == "fp16" and not in_loss else scale)

    assert step(gradient_of(0.25, 0.25))["skipped"] == 0
    assert step.updates == 3


def test_the_guard_is_what_skips():
    """Negative twin: with the flag for the optimizer taken away, the same batches do destroy parameters and moments."""
    loss = planted()
    optimizer = adam(loss.parameters(), lr=0.1)
    step = OptimStep(loss, optimizer, "fp32")
    unguarded = optimizer.step

    def without_flag():
        del optimizer.found_inf
        unguarded()

    optimizer.step = without_flag
    step(BAD["NaN gradient"])
    assert loss.model.weight.isnan().any()


def test_skipped_updates_leave_no_trace_in_what_follows():
    """A run with bad batches in between ends with the same bits as one that never saw them."""

    def train(batches):
        loss = planted()
        step = OptimStep(
            loss,
            adam(loss.parameters(), lr=0.1),
            Precision("fp16", init_scale=4.0),
            max_grad_norm=0.5,
            lr_schedule=lambda done: 0.5**done,
        )
        metrics = [step(batch) for batch in batches]
        return bits([loss.state_dict(), step.optimizers["loss"].state_dict()]), metrics

    good = [gradient_of(1.0, 2.0), gradient_of(-0.5, 0.25), gradient_of(0.125, -1.0)]
    clean, _ = train(good)
    mixed, metrics = train([BAD["NaN loss"], good[0], BAD["infinite gradient"], good[1], BAD["infinite loss"], good[2]])
    assert mixed == clean
    assert [m["skipped"].item() for m in metrics] == [1, 0, 1, 0, 1, 0]
    assert [m["loss_scale"].item() for m in metrics] == [4, 4, 4, 2, 2, 2]
    shorter, _ = train(good[:2])
    assert shorter != clean, "the comparison must be able to fail"


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad], ids=lambda o: o.__name__
)
def test_the_very_first_update_can_be_skipped(optimizer):
    """Fused SGD with momentum, left to itself, keeps uninitialised memory as its momentum then."""
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    results = []
    for batches in ([BAD["NaN gradient"], gradient_of(1.0, 2.0)], [gradient_of(1.0, 2.0)]):
        loss = planted()
        step = OptimStep(loss, optimizer(loss.parameters(), lr=0.1, fused=True, **options), "fp32")
        for batch in batches:
            step(batch)
        step(gradient_of(1.0, -1.0))
        results.append(bits(loss.state_dict()))
    assert results[0] == results[1]


def test_momentum_is_torchs_own():
    losses = linear(), linear()
    ours = torch.optim.SGD(losses[0].parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    theirs = torch.optim.SGD(losses[1].parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    step = OptimStep(losses[0], ours, "fp32")
    for values in ((1.0, 2.0), (-0.5, 0.25), (3.0, 0.0)):
        step(gradient_of(*values))
        losses[1](gradient_of(*values))["loss"].backward()
        theirs.step()
        theirs.zero_grad()
    assert torch.equal(losses[0].model.weight, losses[1].model.weight)


# --------------------------------------------------------------------------------------------- target networks


def dqn(loss_function="l2"):
    torch.manual_seed(0)
    actor = QValueActor(
        MLP(3, 2, num_cells=[8]), in_keys=["observation"], spec=Categorical(2), action_space="categorical"
    )
    return DQNLoss(actor, action_space="categorical", delay_value=True, loss_function=loss_function)


def transitions(seed=0, reward=None):
    torch.manual_seed(seed)
    following = {
        "observation": torch.randn(8, 3),
        "reward": torch.randn(8, 1) if reward is None else torch.full((8, 1), reward),
        "done": torch.zeros(8, 1, dtype=torch.bool),
        "terminated": torch.zeros(8, 1, dtype=torch.bool),
    }
    return TensorDict(
        {"observation": torch.randn(8, 3), "action": torch.randint(2, (8,)), "next": following}, batch_size=[8]
    )


def target_bits(loss):
    return bits(loss.target_value_network_params.flatten_keys(".").to_dict())


def test_soft_update_is_torchrls_own():
    ours, theirs = dqn(), dqn()
    step = OptimStep(ours, adam(ours.parameters(), lr=0.01), "fp32", target_updater=SoftUpdate(ours, tau=0.005))
    optimizer, updater = adam(theirs.parameters(), lr=0.01), SoftUpdate(theirs, tau=0.005)
    start = target_bits(ours)
    assert start == target_bits(theirs)
    for seed in range(6):
        step(transitions(seed))
        theirs(transitions(seed))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        assert target_bits(ours) == target_bits(theirs)
    assert target_bits(ours) != start


def test_hard_update_copies_after_every_interval_of_applied_updates():
    """TorchRL's own `HardUpdate.step` copies once more seldom: its counter rests for one call after every copy."""
    interval = 3

    def copies(loss, update):
        before, at = target_bits(loss), []
        for number in range(1, 13):
            update(number)
            if target_bits(loss) != before:
                assert target_bits(loss) == bits(loss.value_network_params.flatten_keys(".").to_dict())
                before, at = target_bits(loss), [*at, number]
        return at

    ours, theirs = dqn(), dqn()
    updater = HardUpdate(ours, value_network_update_interval=interval)
    step = OptimStep(ours, adam(ours.parameters(), lr=0.01), "fp32", target_updater=updater)
    assert copies(ours, lambda number: step(transitions(number))) == [3, 6, 9, 12]

    own = HardUpdate(theirs, value_network_update_interval=interval)
    moving = OptimStep(theirs, adam(theirs.parameters(), lr=0.01), "fp32")

    def update(number):
        moving(transitions(number))
        own.step()

    assert copies(theirs, update) == [4, 8, 12]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "updater",
    [lambda loss: SoftUpdate(loss, tau=0.5), lambda loss: HardUpdate(loss, value_network_update_interval=3)],
    ids=["soft", "hard"],
)
# With the smooth loss an infinite target gives an infinite loss with finite gradients; with the square, NaN ones.
@pytest.mark.parametrize("loss_function", ["smooth_l1", "l2"])
@pytest.mark.filterwarnings("ignore:.*end the networks in float32")
def test_a_skipped_update_leaves_the_targets(loss_function, updater, precision):
    loss = dqn(loss_function)
    step = OptimStep(loss, adam(loss.parameters(), lr=0.01), named(precision), target_updater=updater(loss))
    for seed in range(2):
        step(transitions(seed))
    before = target_bits(loss), bits(loss.value_network_params.flatten_keys(".").to_dict())
    for seed in range(4):  # more than the interval of the hard update
        metrics = step(transitions(seed, reward=INF))
        assert metrics["skipped"] == 1
        assert not torch.isfinite(metrics["loss"])
        assert torch.isfinite(metrics["grad_norm"]) == (loss_function == "smooth_l1")
        assert (target_bits(loss), bits(loss.value_network_params.flatten_keys(".").to_dict())) == before
    step(transitions(2))  # the third update that counts: both kinds move the target
    assert target_bits(loss) != before[0]
    assert step.updates == 3
    assert step.skipped_steps == 4


# --------------------------------------------------------------------------------------------- several optimizers


def two_losses(shared=False):
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    for part in model.values():
        nn.init.zeros_(part.weight)

    def function(model, batch):
        a, b = model["a"].weight.sum(), model["b"].weight.sum()
        return {"loss_a": a * batch["x"][0], "loss_b": (b + a if shared else b) * batch["x"][1]}

    return Loss(model, function)


def by_key(loss, **options):
    return {f"loss_{key}": adam(part.parameters(), **options) for key, part in loss.model.items()}


def test_an_overflow_of_one_loss_does_not_stop_the_other_optimizer():
    loss = two_losses()
    step = OptimStep(loss, by_key(loss, lr=0.1), Precision("fp16", init_scale=8.0), max_grad_norm=1.0)
    step(gradient_of(1.0, 1.0))
    before = bits([loss.model["a"].state_dict(), step.optimizers["loss_a"].state_dict()])
    b_before = loss.model["b"].weight.item()

    metrics = step(gradient_of(INF, 2.0))
    assert bits([loss.model["a"].state_dict(), step.optimizers["loss_a"].state_dict()]) == before
    assert loss.model["b"].weight.item() == pytest.approx(b_before - 0.1, abs=1e-3)
    assert {key: metrics[key].item() for key in ("skipped_loss_a", "skipped_loss_b", "grad_norm_loss_b")} == {
        "skipped_loss_a": 1.0,
        "skipped_loss_b": 0.0,
        "grad_norm_loss_b": 2.0,
    }
    assert {key: scaler.get_scale() for key, scaler in step.scalers.items()} == {"loss_a": 4.0, "loss_b": 8.0}
    assert step.updates == 1, "an update counts when all of it was applied"
    assert step.skipped_steps == 1


def test_two_optimizers_equal_two_plain_ones():
    loss, reference = two_losses(), two_losses()
    step = OptimStep(loss, by_key(loss, lr=0.1), "fp32", max_grad_norm=1.0)
    optimizers = by_key(reference, lr=0.1)
    for values in ((2.0, 0.5), (-1.0, 3.0)):
        step(gradient_of(*values))
        for key, value in reference(gradient_of(*values)).items():
            value.backward()
            nn.utils.clip_grad_norm_(optimizers[key].param_groups[0]["params"], 1.0)
            optimizers[key].step()
            optimizers[key].zero_grad()
    assert bits(loss.state_dict()) == bits(reference.state_dict())


# -------------------------------------------------------------------------------------------------- what is refused


def test_a_loss_that_reaches_the_parameters_of_another_optimizer_is_refused():
    loss = two_losses(shared=True)
    before = bits(loss.state_dict())
    with pytest.raises(ValueError, match=r"'loss_b' reaches parameters that belong to the optimizer of 'loss_a'"):
        OptimStep(loss, by_key(loss), "fp16")(gradient_of(1.0, 1.0))
    assert bits(loss.state_dict()) == before


def test_a_non_fused_optimizer_is_refused_with_the_fix():
    loss = linear()
    with pytest.raises(ValueError, match=r"build it as torch.optim.AdamW\(..., fused=True\)"):
        OptimStep(loss, torch.optim.AdamW(loss.parameters()), "fp32")
    with pytest.raises(ValueError, match="not fused"):
        OptimStep(loss, torch.optim.RMSprop(loss.parameters()), "fp32")


def test_a_shared_parameter_is_refused():
    loss = two_losses()
    both = adam([*loss.model["a"].parameters(), *loss.model["b"].parameters()])
    with pytest.raises(ValueError, match=r"optimizers of 'loss_a' and 'loss_b' share a parameter of shape \(1, 1\)"):
        OptimStep(loss, {"loss_a": both, "loss_b": adam(loss.model["b"].parameters())}, "fp32")


@pytest.mark.parametrize("keys", [("loss_a",), ("loss_a", "loss_c"), ("loss_a", "b")])
def test_loss_keys_that_do_not_match_are_refused(keys):
    loss = two_losses()
    parts = list(loss.model.values())
    step = OptimStep(loss, {key: adam(part.parameters()) for key, part in zip(keys, parts, strict=False)}, "fp32")
    with pytest.raises(ValueError, match=r"the loss returned \['loss_a', 'loss_b'\], but the optimizers are keyed by"):
        step(gradient_of(1.0, 1.0))


@pytest.mark.parametrize("constant", [True, False], ids=["a constant", "of other parameters"])
def test_a_loss_that_reaches_none_of_its_parameters_is_refused(constant):
    elsewhere = nn.Linear(2, 1)
    loss = Loss(nn.Linear(1, 1), lambda model, batch: torch.ones(()) if constant else elsewhere.weight.sum())
    with pytest.raises(ValueError, match="'loss' does not depend on any parameter of its optimizer"):
        OptimStep(loss, adam(loss.parameters()), "fp32")(TensorDict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_that_are_not_float32_are_refused(dtype):
    loss = linear().to(dtype)
    with pytest.raises(ValueError, match=f"must be float32 master weights; found {dtype}"):
        OptimStep(loss, adam(loss.parameters()), "fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
        ({"max_grad_norm": NAN}, "max_grad_norm must be > 0"),
        ({"accumulate": 0}, "accumulate must be >= 1"),
        ({"precision": "fp64"}, "unknown precision 'fp64'; use one of fp32"),
        ({"precision": "fp8"}, "not available in this version"),
        ({"optimizer": {}}, "give one optimizer"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    loss = linear()
    arguments = {"optimizer": adam(loss.parameters()), "precision": "fp32", **options}
    with pytest.raises(ValueError, match=message):
        OptimStep(loss, arguments.pop("optimizer"), arguments.pop("precision"), **arguments)


def test_sgd_that_cannot_skip_its_first_step_is_refused():
    loss = linear()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9, dampening=0.1, fused=True)
    with pytest.raises(ValueError, match="drop dampening"):
        OptimStep(loss, optimizer, "fp32")


def test_a_target_updater_of_another_kind_is_refused():
    loss = linear()
    with pytest.raises(TypeError, match="must be a SoftUpdate or a HardUpdate; got function"):
        OptimStep(loss, adam(loss.parameters()), "fp32", target_updater=lambda: None)


def test_a_loss_module_without_losses_is_refused():
    loss = Loss(nn.Linear(1, 1), lambda model, batch: {"objective": model.weight.sum()})
    with pytest.raises(ValueError, match=r"no entry that starts with 'loss', only \['objective'\]"):
        OptimStep(loss, adam(loss.parameters()), "fp32")(TensorDict())


# ------------------------------------------------------------------------------------------- gradient accumulation


def test_accumulated_micro_batches_equal_the_whole_batch():
    whole, parts = regression(), regression()
    one = OptimStep(whole, adam(whole.parameters(), lr=0.01), "fp32", max_grad_norm=0.5)
    four = OptimStep(parts, adam(parts.parameters(), lr=0.01), "fp32", max_grad_norm=0.5, accumulate=4)
    expected = {"grad_norm": torch.tensor(0.0)}
    for seed in range(3):
        batch, of_last_step = data(rows=16, seed=seed), expected["grad_norm"]
        expected = one(batch)
        before = bits(parts.state_dict())
        for micro in batch.split(4)[:3]:
            under_way = four(micro)  # the keys never change, which TorchRL's Trainer relies on
            assert sorted(under_way.keys()) == ["grad_norm", "loss", "loss_scale", "skipped"]
            assert torch.allclose(under_way["grad_norm"], of_last_step, rtol=1e-5)
            assert bits(parts.state_dict()) == before
        metrics = four(batch[12:])
        assert torch.allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-5)
        for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert four.updates == one.updates == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("place", range(3))
def test_one_bad_micro_batch_skips_the_whole_update(place, kind, precision):
    loss = planted()
    step = OptimStep(loss, adam(loss.parameters(), lr=0.1), precision, accumulate=3)
    micro = [gradient_of(1.0, 1.0)] * 3
    micro[place] = BAD[kind]
    assert [step(batch) for batch in micro][-1]["skipped"] == 1
    assert loss.model.weight.tolist() == [[0.0, 0.0]]
    assert step.skipped_steps == 1
    assert [step(gradient_of(1.0, 1.0)) for _ in range(3)][-1]["skipped"] == 0
    assert step.updates == 1


# ------------------------------------------------------------------------------------------------- saving, loading


def trained(batches, precision=None):
    loss = planted()
    step = OptimStep(
        loss,
        adam(loss.parameters(), lr=0.1),
        precision or Precision("fp16", init_scale=8.0, growth_interval=3),
        lr_schedule=lambda done: 0.5**done,
    )
    for batch in batches:
        step(batch)
    return loss, step


FIRST = [gradient_of(1.0, 2.0), BAD["NaN gradient"], gradient_of(0.5, -1.0), gradient_of(0.1, 0.2)]
SECOND = [gradient_of(-1.0, 0.5), BAD["NaN loss"], gradient_of(0.3, 0.4)]


@pytest.mark.parametrize("precision", [None, "bf16"], ids=["fp16", "bf16"])
def test_a_restored_step_goes_on_like_one_that_never_stopped(precision, tmp_path):
    loss, step = trained(FIRST + SECOND, precision)
    whole = bits([loss.state_dict(), step.state_dict()])

    loss, step = trained(FIRST, precision)
    Checkpoint(model=loss, step=step).save(tmp_path / "checkpoint")
    loss, step = trained([gradient_of(9.0, 9.0)], precision)  # another history, all of which must go
    Checkpoint(model=loss, step=step).load(tmp_path / "checkpoint")
    assert step.updates == 3
    assert step.skipped_steps == 1
    for batch in SECOND:
        step(batch)
    assert bits([loss.state_dict(), step.state_dict()]) == whole


@pytest.mark.parametrize("forgotten", ["optimizers", "scalers", "updates"])
def test_everything_that_is_saved_matters(forgotten):
    """Negative twin: without any one of its parts a restored step goes on differently."""
    loss, step = trained(FIRST + SECOND)
    whole = bits([loss.state_dict(), step.state_dict()])
    loss, step = trained(FIRST)
    saved = copy.deepcopy([loss.state_dict(), step.state_dict()])
    loss, step = trained([])
    saved[1][forgotten] = copy.deepcopy(step.state_dict()[forgotten])
    loss.load_state_dict(saved[0])
    step.load_state_dict(saved[1])
    for batch in SECOND:
        step(batch)
    assert bits([loss.state_dict(), step.state_dict()]) != whole


def test_it_is_not_saved_in_the_middle_of_an_accumulated_update():
    loss = linear()
    step = OptimStep(loss, adam(loss.parameters()), "fp32", accumulate=2)
    saved = copy.deepcopy(step.state_dict())
    step(gradient_of(1.0, 1.0))
    with pytest.raises(RuntimeError, match="save after its last call"):
        step.state_dict()
    step(gradient_of(1.0, 1.0))
    assert step.state_dict()["updates"] == 1

    step(gradient_of(NAN, 5.0))
    step.load_state_dict(saved)  # drops the half-made update, its NaN included
    step(gradient_of(1.0, 0.0))
    assert step(gradient_of(3.0, 0.0))["grad_norm"] == 2.0
    assert step.updates == 1


# --------------------------------------------------------------------------------------------- no waiting for the host


class NoHostReads(TorchDispatchMode):
    """Fails where a value on the device would be read on the host."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.partition("::")[2]
        if name in self.READS:
            raise AssertionError(f"aten::{name} waits for the device")
        return func(*args, **(kwargs or {}))


def complete_steps(precision, device="cpu"):
    """Steps that use everything `OptimStep` offers; each comes with its batches."""
    dtype = {"device": device}
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).to(**dtype)
    loss = Loss(model, lambda model, batch: (model(batch["x"]).float() - batch["y"]).square().mean())
    schedule = {"lr_schedule": lambda done: (1 - done / 100).clamp(min=0.1), "max_grad_norm": 0.5}
    bad = data(seed=5).to(device)
    bad["y"] = torch.full_like(bad["y"], NAN)
    batches = [data(seed=seed).to(device) for seed in range(4)] + [bad]
    yield OptimStep(loss, adam(loss.parameters()), precision, accumulate=2, **schedule), [*batches, batches[0]]

    two = two_losses().to(**dtype)
    yield OptimStep(two, by_key(two), precision, **schedule), [gradient_of(1.0, INF).to(device)] * 3

    env = CustomEnv(num_envs=4, seed=0, device=device)
    agent = ActorCritic.for_env(env)
    actor_critic = ReplayedActorCriticLoss(agent)
    rollout = env.rollout(8, agent.policy).flatten().detach()
    yield OptimStep(actor_critic, adam(agent.parameters()), precision, **schedule), [rollout] * 3


def run_without_host_reads(precision):
    for step, batches in complete_steps(precision):
        step(batches[0])  # the first call checks that losses and optimizers fit together, and may read
        with NoHostReads():
            for batch in batches[1:]:
                step(batch)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_reads_nothing_on_the_host(precision):
    run_without_host_reads(precision)


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_target_networks_move_without_host_reads(updater):
    loss = dqn()
    options = {"tau": 0.1} if updater is SoftUpdate else {"value_network_update_interval": 2}
    step = OptimStep(loss, adam(loss.parameters()), "fp16", target_updater=updater(loss, **options))
    step.loss = Loss(loss, lambda loss, batch: sum(p.square().sum() for p in loss.parameters()))
    before = target_bits(loss)
    with NoHostReads():
        for seed in range(4):
            step(transitions(seed))
    assert target_bits(loss) != before
    assert step.updates == 4


def test_host_reads_are_caught(monkeypatch):
    """Negative twin: a step that asks on the host whether to skip, as `GradScaler.step` does for other optimizers."""
    guarded = OptimStep._apply

    def asking(self):
        assert self._finite[next(iter(self._finite))].item()
        return guarded(self)

    monkeypatch.setattr(OptimStep, "_apply", asking)
    with pytest.raises(AssertionError, match="aten::_local_scalar_dense waits for the device"):
        run_without_host_reads("fp16")


def test_the_stock_scaler_with_a_plain_optimizer_is_caught():
    loss = regression()
    optimizer, scaler = torch.optim.Adam(loss.parameters()), torch.amp.GradScaler("cpu")
    with NoHostReads():
        scaler.scale(loss(data())["loss"]).backward()
        with pytest.raises(AssertionError, match="waits for the device"):
            scaler.step(optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_update_does_not_synchronise_a_gpu(precision):
    for step, batches in complete_steps(precision, "cuda"):
        step(batches[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[1:]:
                step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert step.updates + step.skipped_steps > 1


@pytest.mark.gpu
def test_a_host_read_on_a_gpu_is_caught(monkeypatch):
    guarded = OptimStep._apply
    monkeypatch.setattr(OptimStep, "_apply", lambda self, m: guarded(self, m) if self.updates.item() >= 0 else None)
    step, batches = next(complete_steps("fp16", "cuda"))
    step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------------- with TorchRL's own parts


def continuous_actor():
    torch.manual_seed(0)
    network = nn.Sequential(MLP(3, 4, num_cells=[16]), NormalParamExtractor())
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        spec=Bounded(-1, 1, (2,)),
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def continuous_transitions(seed=0, reward=None):
    torch.manual_seed(seed)
    batch = transitions(seed, reward)
    with torch.no_grad():
        continuous_actor()(batch)
    return batch


def value_operator(inputs=3, in_keys=("observation",)):
    return ValueOperator(MLP(inputs, 1, num_cells=[16]), in_keys=list(in_keys))


def torchrl_losses(name):
    if name == "A2C":
        return A2CLoss(continuous_actor(), value_operator())
    if name == "PPO":
        return ClipPPOLoss(continuous_actor(), value_operator())
    if name == "SAC":
        critic = ValueOperator(_Concatenated(MLP(5, 1, num_cells=[16])), in_keys=["observation", "action"])
        return SACLoss(continuous_actor(), critic, num_qvalue_nets=2, action_spec=Bounded(-1, 1, (2,)))
    return dqn()


class _Concatenated(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, observation, action):
        return self.network(torch.cat((observation, action), -1))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["A2C", "PPO", "DQN", "SAC"])
@pytest.mark.filterwarnings("ignore:.*end the networks in float32", "ignore::DeprecationWarning")
def test_torchrls_losses_train(name, precision):
    loss = torchrl_losses(name)
    batch = transitions() if name == "DQN" else continuous_transitions()
    if name in ("A2C", "PPO"):  # advantages are estimated outside of autocast
        loss.make_value_estimator(gamma=0.9)
        loss.value_estimator(
            batch, params=loss.critic_network_params.detach(), target_params=loss.target_critic_network_params
        )
    updater = SoftUpdate(loss, tau=0.1) if name in ("DQN", "SAC") else None
    step = OptimStep(
        loss, adam(loss.parameters(), lr=1e-3), named(precision), max_grad_norm=1.0, target_updater=updater
    )
    before = bits(dict(loss.named_parameters()))
    metrics = [step(batch.clone()) for _ in range(3)]
    assert all(m["skipped"] == 0 for m in metrics)
    assert step.updates == 3
    after = bits(dict(loss.named_parameters()))
    assert all(after[key] != before[key] for key in before if "target" not in key)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:.*end the networks in float32")
def test_sac_with_an_optimizer_for_each_of_its_losses(precision):
    loss = torchrl_losses("SAC")
    optimizers = {
        "loss_actor": adam(loss.actor_network_params.flatten_keys().values()),
        "loss_qvalue": adam(loss.qvalue_network_params.flatten_keys().values()),
        "loss_alpha": adam([loss.log_alpha]),
    }
    parameters = {
        key: [p for p in each.param_groups[0]["params"] if p.requires_grad] for key, each in optimizers.items()
    }
    step = OptimStep(loss, optimizers, named(precision), target_updater=SoftUpdate(loss, tau=0.1))
    before = bits(parameters)
    metrics = step(continuous_transitions())
    assert metrics["skipped_loss_actor"] == metrics["skipped_loss_qvalue"] == metrics["skipped_loss_alpha"] == 0
    after = bits(parameters)
    assert all(after[key] != before[key] for key in before)

    # An infinite reward ruins the critic's loss alone, and the critic's update alone is skipped.
    before, targets = after, bits(loss.target_qvalue_network_params.flatten_keys(".").to_dict())
    metrics = step(continuous_transitions(1, reward=INF))
    assert metrics["skipped_loss_qvalue"] == 1
    assert metrics["skipped_loss_actor"] == metrics["skipped_loss_alpha"] == 0
    after = bits(parameters)
    assert {key: after[key] == before[key] for key in before} == {
        "loss_actor": False,
        "loss_qvalue": True,
        "loss_alpha": False,
    }
    assert bits(loss.target_qvalue_network_params.flatten_keys(".").to_dict()) == targets
    assert step.updates == 1


@pytest.mark.parametrize(("precision", "accumulate"), [("bf16", 1), ("fp16", 1), ("fp16", 2)])
def test_it_is_the_optimization_stepper_of_a_torchrl_trainer(precision, accumulate):
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env, hidden=(8,))
    loss = ReplayedActorCriticLoss(agent)
    step = OptimStep(loss, adam(agent.parameters(), lr=1e-2), precision, max_grad_norm=0.5, accumulate=accumulate)
    assert isinstance(step, OptimizationStepper)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)
    trainer = Trainer(
        collector=Collector(
            env, agent.policy, frames_per_batch=32, total_frames=96, auto_register_policy_transforms=False
        ),
        total_frames=96,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimization_stepper=step,
        progress_bar=False,
        seed=0,
    )
    seen = []
    trainer.register_op("batch_process", lambda batch: replay.extend(batch.select(*loss.in_keys).reshape(-1)))
    trainer.register_op("process_optim_batch", lambda batch: replay.sample())
    trainer.register_op("post_optim_log", lambda batch: seen.append(int(step.updates)) or {})
    before = bits(agent.state_dict())
    trainer.train()
    assert bits(agent.state_dict()) != before
    # Three collections, two calls after each.
    assert seen == ([1, 2, 3, 4, 5, 6] if accumulate == 1 else [0, 1, 1, 2, 2, 3])


def test_the_trainers_loss_is_the_one_that_trains():
    """`step(trainer, batch)` asks the trainer for the loss, so that its execution backend stays in charge."""
    loss = linear()

    class Context:
        def compute_loss(self, batch):
            return TensorDict(loss=10 * loss(batch)["loss"])

    step = OptimStep(loss, descent(loss.parameters()), "fp32")
    step.step(Context(), gradient_of(1.0, 2.0))
    assert loss.model.weight.tolist() == [[-10.0, -20.0]]
