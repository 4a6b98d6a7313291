"""What the on-policy recipes share: their own number of updates, the length of the decay, and what is refused."""

import math

import pytest

from fp8rl_torchrl.recipes import A2CConfig, PPOConfig


@pytest.mark.parametrize(
    ("config", "updates", "decay"),
    [
        # 100 collections, one update each
        (A2CConfig(num_envs=4, frames_per_collection=40, total_frames=4000), 1, 100),
        # 100 collections of 2 epochs x 4 minibatches
        (PPOConfig(num_envs=4, frames_per_collection=40, batch_size=10, epochs=2, total_frames=4000), 8, 800),
        # a part of a collection is collected whole
        (A2CConfig(num_envs=4, frames_per_collection=40, total_frames=41), 1, 2),
    ],
)
def test_updates_and_decay_are_those_of_the_run(config, updates, decay):
    resolved = config.resolved()
    assert (resolved.updates_per_collection, resolved.lr_decay_updates) == (updates, decay)
    assert resolved.resolved() == resolved


@pytest.mark.parametrize("config", [A2CConfig, PPOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, r"lmbda must lie in \[0, 1\]; got 1.5"),
        ({"lr_final": math.nan}, r"lr_final must lie in \[0, 1\]"),
        ({"critic_coeff": -1.0}, "critic_coeff must be >= 0; got -1.0"),
        ({"entropy_coeff": math.nan}, "entropy_coeff must be >= 0"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be >= 1"),
        ({"min_replay": 5}, "leave them out"),
        ({"updates_per_collection": 9999}, "leave them out"),
    ],
)
def test_what_cannot_be_run_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
