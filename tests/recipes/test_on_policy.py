"""What the on-policy recipes share: their own number of updates, the length of the decay, and what is refused."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fp8rl_torchrl.recipes import A2CConfig, PPOConfig, ReinforceConfig, build
from fp8rl_torchrl.recipes.on_policy import FreshConfig, OnPolicyConfig

SMALL = {"num_envs": 4, "frames_per_collection": 40, "total_frames": 80, "hidden": (16,), "device": "cpu"}


@pytest.mark.parametrize(
    ("config", "updates", "decay"),
    [
        # 100 collections, one update each
        (A2CConfig(num_envs=4, frames_per_collection=40, total_frames=4000), 1, 100),
        # 100 collections of 2 epochs x 4 minibatches
        (PPOConfig(num_envs=4, frames_per_collection=40, batch_size=10, epochs=2, total_frames=4000), 8, 800),
        (ReinforceConfig(num_envs=4, frames_per_collection=40, total_frames=4000), 1, 100),
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


@pytest.mark.parametrize("options", [{"min_replay": 5}, {"updates_per_collection": 2}])
def test_what_every_fresh_recipe_has_not_is_refused(options):
    with pytest.raises(
        ValueError, match="are not options of this recipe, which learns from each collection as it comes"
    ):
        ReinforceConfig(**options)


def test_what_follows_from_the_other_options_may_be_said():
    """A configuration that was resolved, and saved, is taken again."""
    for config in (A2CConfig(**SMALL), PPOConfig(batch_size=10, **SMALL), ReinforceConfig(**SMALL)):
        resolved = config.resolved()
        assert resolved.updates_per_collection is not None
        assert type(config).from_dict(resolved.to_dict()) == resolved


def test_advantages_are_not_options_of_reinforce():
    assert issubclass(ReinforceConfig, FreshConfig)
    assert not issubclass(ReinforceConfig, OnPolicyConfig)
    with pytest.raises(ValueError, match="unknown options lmbda"):
        ReinforceConfig.from_dict({"lmbda": 0.5})


@pytest.mark.parametrize("config", [A2CConfig(**SMALL), PPOConfig(batch_size=10, **SMALL)], ids=["a2c", "ppo"])
@pytest.mark.parametrize("shared", [True, False])
def test_actor_and_critic_share_the_encoder_or_do_not(config, shared):
    pipeline = build(dataclasses.replace(config, shared=shared))
    assert pipeline.agent.shared == shared
    widths = [layer.out_features for layer in pipeline.agent.modules() if isinstance(layer, nn.Linear)]
    assert sorted(widths) == sorted([16, 2, 1] if shared else [16, 16, 2, 1])
    *_, report = pipeline
    assert math.isfinite(report.metrics["loss_critic"])


@pytest.mark.parametrize("config", [A2CConfig(**SMALL), PPOConfig(batch_size=10, **SMALL)], ids=["a2c", "ppo"])
def test_separate_encoders_each_learn_their_own(config):
    """Without a critic's loss, a separate critic stays as it is, and a shared encoder does not."""
    for shared in (True, False):
        # no weight on the critic: what it learns from is multiplied by 0
        pipeline = build(dataclasses.replace(config, shared=shared, critic_coeff=0.0))
        before = [parameter.clone() for parameter in pipeline.agent.value.parameters()]
        list(pipeline)
        after = list(pipeline.agent.value.parameters())
        assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True)) == shared
