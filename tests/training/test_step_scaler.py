"""`OptimStep` and the loss scaler: what it keeps, how it grows and backs off, and where it is disabled."""

import pytest
import torch
from losses import PRECISIONS, Loss, adam, data, descent, gradient_of, linear
from torch import nn

from fp8rl_torchrl import OptimStep, Precision

pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


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
