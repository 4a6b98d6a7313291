"""`OptimStep` moves target networks after the updates that were applied, and after no others."""

import pytest
import torch
from losses import INF, adam, bits, dqn, named, target_bits, transitions
from torchrl.objectives import HardUpdate, SoftUpdate

from fp8rl_torchrl import OptimStep


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
