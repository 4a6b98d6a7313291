"""`OptimStep`: what one update does, of one optimizer and of several, in one call and in several."""

import copy
import warnings

import pytest
import torch
from losses import (
    BAD,
    INF,
    PRECISIONS,
    Loss,
    adam,
    bits,
    by_key,
    data,
    descent,
    gradient_of,
    linear,
    planted,
    regression,
    two_losses,
)
from tensordict import TensorDict
from torch import nn

from fp8rl_torchrl import OptimStep, Precision

pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


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


# --------------------------------------------------------------------------------------------- several optimizers


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
