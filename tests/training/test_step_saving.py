"""`OptimStep`, saved and restored: it goes on as if it had never stopped."""

import copy

import pytest
from losses import BAD, NAN, adam, bits, gradient_of, linear, planted
from torchrl.checkpoint import Checkpoint

from fp8rl_torchrl import OptimStep, Precision


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
