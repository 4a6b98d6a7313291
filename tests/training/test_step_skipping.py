"""`OptimStep` skips an update whose loss or gradient is not finite, and the update leaves no trace."""

import pytest
import torch
from losses import BAD, PRECISIONS, adam, bits, gradient_of, linear, planted

from fp8rl_torchrl import OptimStep, Precision

pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


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
