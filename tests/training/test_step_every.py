"""`OptimStep(every=...)`: an optimizer that steps at some calls only, as the actor of TD3 does."""

import copy

import pytest
import torch
from losses import INF, adam, bits, by_key, gradient_of, linear, two_losses
from torch import nn
from torchrl.checkpoint import Checkpoint

from fp8rl_torchrl import OptimStep, Precision

CALLS = [(1.0, 2.0), (-0.5, 0.25), (3.0, -1.0), (0.125, 0.5), (-2.0, 1.0)]
BATCHES = [gradient_of(*values) for values in CALLS]


def resting(precision="fp32", every=2, **options):
    """Of two losses, the optimizer of ``loss_a`` steps at every second call."""
    loss = two_losses()
    optimizers = by_key(loss, lr=0.1)
    return loss, OptimStep(loss, optimizers, precision, every={"loss_a": every}, **options)


def part_of(loss, step, key):
    return bits([loss.model[key].state_dict(), step.optimizers[f"loss_{key}"].state_dict()])


def test_it_steps_at_the_first_call_and_then_at_every_second():
    loss, step = resting(max_grad_norm=1.0)
    for number, batch in enumerate(BATCHES):
        before = [part_of(loss, step, key) for key in "ab"]
        step(batch)
        moved = [part_of(loss, step, key) != was for key, was in zip("ab", before, strict=True)]
        assert moved == [number % 2 == 0, True]
    assert step.updates == 5
    assert step.skipped_steps == 0


@pytest.mark.parametrize("every", [1, 2, 3])
def test_each_optimizer_does_what_one_by_itself_would_do(every):
    loss, step = resting(every=every, max_grad_norm=1.0)
    reference = two_losses()
    optimizers = by_key(reference, lr=0.1)
    for number, batch in enumerate(BATCHES):
        step(batch)
        losses = reference(batch)
        for key, due in (("loss_a", number % every == 0), ("loss_b", True)):
            if due:
                losses[key].backward()
                nn.utils.clip_grad_norm_(optimizers[key].param_groups[0]["params"], 1.0)
                optimizers[key].step()
                optimizers[key].zero_grad()
    assert bits(loss.state_dict()) == bits(reference.state_dict())


def test_gradients_of_the_calls_between_are_not_gathered():
    """Negative twin of the above: an optimizer that rests is not one that accumulates."""
    loss, step = resting()
    step.optimizers["loss_a"].param_groups[0]["betas"] = (0.0, 0.0)  # the step is then the sign of the gradient
    step(BATCHES[0])
    before = loss.model["a"].weight.item()
    step(gradient_of(1e6, 1.0))
    step(gradient_of(-1.0, 1.0))
    assert loss.model["a"].weight.item() == pytest.approx(before + 0.1, abs=1e-6)


def test_the_metrics():
    _, step = resting(Precision("fp16", init_scale=8.0))
    found = [step(batch) for batch in BATCHES]
    names = {f"{name}_loss_{key}" for name in ("grad_norm", "skipped", "loss_scale") for key in "ab"}
    assert all(set(metrics.keys()) == {"loss_a", "loss_b"} | names for metrics in found)
    assert [metrics["grad_norm_loss_b"].item() for metrics in found] == [2.0, 0.25, 1.0, 0.5, 1.0]
    # of one that rests: its last step's
    assert [metrics["grad_norm_loss_a"].item() for metrics in found] == [1.0, 1.0, 3.0, 3.0, 2.0]
    assert all(metrics["loss_scale_loss_a"] == 8 for metrics in found)
    assert all(metrics["skipped_loss_a"] == metrics["skipped_loss_b"] == 0 for metrics in found)
    # its loss is computed all the same: the weight times x
    assert found[1]["loss_a"].item() == pytest.approx(-0.1 * -0.5)


def test_a_loss_that_rests_can_overflow():
    loss, step = resting(Precision("fp16", init_scale=8.0))
    step(BATCHES[0])
    before = part_of(loss, step, "a")
    metrics = step(gradient_of(INF, 1.0))
    assert (metrics["skipped_loss_a"], metrics["skipped_loss_b"]) == (0, 0)
    assert part_of(loss, step, "a") == before
    assert {key: scaler.get_scale() for key, scaler in step.scalers.items()} == {"loss_a": 8.0, "loss_b": 8.0}
    assert (step.updates, step.skipped_steps) == (2, 0)
    assert step(BATCHES[2])["skipped_loss_a"] == 0, "and nothing of it is left at the next call"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_overflow_skips_one_of_them_and_keeps_the_rhythm(precision):
    loss, step = resting(Precision(precision, init_scale=8.0))
    metrics = step(gradient_of(INF, 1.0))
    assert (metrics["skipped_loss_a"], metrics["skipped_loss_b"]) == (1, 0)
    assert (step.updates, step.skipped_steps) == (0, 1)
    before = part_of(loss, step, "a")
    assert step(BATCHES[1])["skipped_loss_a"] == 0
    assert part_of(loss, step, "a") == before, "its next turn is at the third call"
    metrics = step(gradient_of(1.0, INF))
    assert (metrics["skipped_loss_a"], metrics["skipped_loss_b"]) == (0, 1)
    assert part_of(loss, step, "a") != before
    assert (step.updates, step.skipped_steps) == (1, 2)


def test_a_loss_scale_grows_with_its_own_steps():
    _, step = resting(Precision("fp16", init_scale=8.0, growth_interval=2))
    scales = []
    for batch in BATCHES:
        step(batch)
        scales.append([step.scalers[f"loss_{key}"].get_scale() for key in "ab"])
    # b doubles after the calls 1 and 3, a after its second step, the call 2
    assert scales == [[8.0, 8.0], [8.0, 16.0], [16.0, 16.0], [16.0, 32.0], [16.0, 32.0]]


def test_the_learning_rate_follows_all_updates():
    _, step = resting(lr_schedule=lambda done: 0.5**done)
    rates = []
    for batch in BATCHES:
        step(batch)
        rates.append([step.optimizers[f"loss_{key}"].param_groups[0]["lr"].item() for key in "ab"])
    assert rates == [pytest.approx([0.1 * 0.5**done] * 2) for done in range(5)]


# ---------------------------------------------------------------------------------------------------- saved, restored


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_restored_step_keeps_the_rhythm(stopped_after, tmp_path):
    loss, step = resting(max_grad_norm=1.0)
    expected = [bits(dict(step(batch).items())) for batch in BATCHES]
    whole = bits([loss.state_dict(), step.state_dict()])

    loss, step = resting(max_grad_norm=1.0)
    found = [bits(dict(step(batch).items())) for batch in BATCHES[:stopped_after]]
    Checkpoint(model=loss, step=step).save(tmp_path / "checkpoint")
    loss, step = resting(max_grad_norm=1.0)
    step(gradient_of(9.0, 9.0))  # another history, all of which must go
    Checkpoint(model=loss, step=step).load(tmp_path / "checkpoint")
    found += [bits(dict(step(batch).items())) for batch in BATCHES[stopped_after:]]
    assert found == expected
    assert bits([loss.state_dict(), step.state_dict()]) == whole


def test_what_keeps_the_rhythm_is_the_number_of_calls():
    """Negative twin: with the count forgotten, the optimizer that rested goes on at once."""
    loss, step = resting()
    for batch in BATCHES[:3]:
        step(batch)
    saved = copy.deepcopy([loss.state_dict(), step.state_dict()])
    assert saved[1]["calls"] == 3
    ends = []
    for calls in (3, 0):
        loss, step = resting()
        loss.load_state_dict(saved[0])
        step.load_state_dict(copy.deepcopy(saved[1]) | {"calls": calls})
        before = part_of(loss, step, "a")
        step(BATCHES[3])
        ends.append(part_of(loss, step, "a") != before)
    assert ends == [False, True]


def test_a_state_that_was_saved_without_a_count_is_taken():
    loss, step = resting()
    step(BATCHES[0])
    old = {key: value for key, value in step.state_dict().items() if key not in ("calls", "last_step")}
    step.load_state_dict(copy.deepcopy(old))
    before = part_of(loss, step, "a")
    step(BATCHES[1])
    assert part_of(loss, step, "a") != before, "it counts from the beginning"


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("every", "message"),
    [
        ({"loss_c": 2}, "every names loss_c; the optimizers are loss_a, loss_b"),
        ({"loss_a": 0}, r"every must hold integers >= 1; got {'loss_a': 0}"),
        ({"loss_a": -1}, "every must hold integers >= 1"),
        ({"loss_a": 2.0}, "every must hold integers >= 1"),
        ({"loss_a": True}, "every must hold integers >= 1"),
        ({"loss_a": 2, "loss_b": 3}, "every needs another optimizer that steps always"),
    ],
)
def test_a_rhythm_that_cannot_be_kept_is_refused(every, message):
    loss = two_losses()
    with pytest.raises(ValueError, match=message):
        OptimStep(loss, by_key(loss), "fp32", every=every)


def test_a_rhythm_beside_accumulation_is_refused():
    loss = two_losses()
    with pytest.raises(ValueError, match=r"every needs .* accumulate=1 and no CUDA graph"):
        OptimStep(loss, by_key(loss), "fp32", every={"loss_a": 2}, accumulate=2)
    OptimStep(loss, by_key(loss), "fp32", every={}, accumulate=2)


def test_one_optimizer_has_no_rhythm():
    loss = linear()
    with pytest.raises(ValueError, match="every needs another optimizer that steps always"):
        OptimStep(loss, adam(loss.parameters()), "fp32", every={"loss": 2})
    OptimStep(loss, adam(loss.parameters()), "fp32", every={})


# -------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_compiled_it_does_the_same(precision):
    ends = []
    for compile in (False, True):
        loss, step = resting(Precision(precision, init_scale=8.0), max_grad_norm=1.0, compile=compile)
        metrics = [torch.stack([value for _, value in sorted(step(batch).items())]) for batch in BATCHES]
        ends.append((torch.stack(metrics), loss.model["a"].weight.clone(), loss.model["b"].weight.clone()))
        assert step.updates == 5
    for eager, compiled in zip(*ends, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-6)
