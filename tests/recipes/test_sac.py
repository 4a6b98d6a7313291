"""The SAC recipe: its options, three optimizers with a loss scale each, its temperature, and its runs."""

import dataclasses
import math

import pytest
import torch
from runs import PRECISIONS, REPLAYED, batch_of, check_resuming, finish, owned_bits, target_bits, trained
from torchrl.objectives import DiscreteSACLoss, SACLoss

from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.recipes import SACConfig, build

CONTINUOUS = SACConfig(env="Pendulum-v1", **REPLAYED)
DISCRETE = SACConfig(env="CartPole-v1", **REPLAYED)
KEYS = ("loss_actor", "loss_qvalue", "loss_alpha")
both = pytest.mark.parametrize("config", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


# ---------------------------------------------------------------------------------------------- options and parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be > 0; got 0.0"),
        ({"alpha": math.nan}, "alpha must be > 0"),
        ({"target_entropy_share": 0.0}, r"target_entropy_share must lie in \(0, 1\); got 0.0"),
        ({"target_entropy_share": 1.0}, r"target_entropy_share must lie in \(0, 1\); got 1.0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SACConfig(**options)


@both
def test_it_is_made_of_the_parts_it_names(config):
    pipeline = build(dataclasses.replace(config, alpha=0.25, gamma=0.5))
    assert type(pipeline.agent) is ActorQ
    assert pipeline.agent.exploration is None, "the policy explores by itself"
    assert type(pipeline.loss) is (SACLoss if config is CONTINUOUS else DiscreteSACLoss)
    assert pipeline.loss.num_qvalue_nets == 2
    assert pipeline.loss.value_estimator.gamma == 0.5
    assert pipeline.loss.log_alpha.exp().item() == pytest.approx(0.25)
    assert tuple(pipeline.step.optimizers) == KEYS


def test_the_target_entropy():
    assert build(CONTINUOUS).loss.target_entropy.item() == -1.0  # minus the number of components
    # half, or a tenth, of the largest entropy of two actions
    assert build(DISCRETE).loss.target_entropy.item() == pytest.approx(0.5 * math.log(2))
    share = dataclasses.replace(DISCRETE, target_entropy_share=0.1)
    assert build(share).loss.target_entropy.item() == pytest.approx(0.1 * math.log(2))
    for config in (CONTINUOUS, DISCRETE):
        given = dataclasses.replace(config, target_entropy=0.125)
        assert float(build(given).loss.target_entropy) == 0.125


@both
def test_the_temperature_falls_where_there_is_more_entropy_than_asked_for(config):
    """A first policy is almost uniform: its weight on entropy falls, and rises where even more is asked for."""
    *_, report = build(dataclasses.replace(config, target_entropy=-5.0, lr=0.01))
    assert report.metrics["alpha"] < 0.97
    *_, report = build(dataclasses.replace(config, target_entropy=5.0, lr=0.01))
    assert report.metrics["alpha"] > 1.03


# ------------------------------------------------------------------------------------- one loss scale an optimizer


@both
def test_each_loss_trains_what_is_its_own(config):
    pipeline = build(config)
    step, loss = pipeline.step, pipeline.loss
    leaves = {key: {id(leaf) for leaf in step._gradients.leaves[key]} for key in KEYS}
    assert leaves["loss_alpha"] == {id(loss.log_alpha)}
    assert leaves["loss_actor"] == {id(parameter) for parameter in pipeline.agent.actor.parameters()}
    assert not leaves["loss_actor"] & leaves["loss_qvalue"]
    critics = sum(leaf.numel() for leaf in step._gradients.leaves["loss_qvalue"])
    assert critics == 2 * sum(parameter.numel() for parameter in pipeline.agent.qvalue.parameters())


@both
@pytest.mark.parametrize("overflowing", KEYS)
def test_an_overflow_of_one_loss_does_not_stop_the_other_optimizers(config, overflowing):
    options = {"precision": "fp16", "lr_schedule": "linear", "lr_decay_updates": 100}
    pipeline = build(dataclasses.replace(config, target_entropy=-5.0, **options))  # of alpha, too, a steep loss
    next(iter(pipeline))
    step = pipeline.step
    step.scalers[overflowing]._scale.fill_(2.0**127)
    others = [key for key in KEYS if key != overflowing]
    before = {key: owned_bits(pipeline, key) for key in KEYS}
    targets = target_bits(pipeline.loss)
    metrics = step(batch_of(pipeline))
    assert {key: metrics[f"skipped_{key}"].item() for key in KEYS} == {
        overflowing: 1.0,
        others[0]: 0.0,
        others[1]: 0.0,
    }
    assert math.isfinite(metrics[overflowing].item()), "only its gradient, times its scale, is too large"
    # the rate of the group is that of the next update, which this one was to be
    after = {key: owned_bits(pipeline, key) for key in KEYS}
    assert after[overflowing][0] == before[overflowing][0]
    assert after[overflowing][1]["state"] == before[overflowing][1]["state"]
    for key in others:
        assert after[key][0] != before[key][0]
        assert after[key][1]["state"] != before[key][1]["state"]
    # each scale is its own
    assert step.scalers[overflowing].get_scale() == 2.0**126
    assert [step.scalers[key].get_scale() for key in others] == [64.0, 64.0]
    # what belongs to all of them waits
    assert target_bits(pipeline.loss) == targets
    assert (step.updates, step.skipped_steps) == (3, 1)
    rates = {float(optimizer.param_groups[0]["lr"]) for optimizer in step.optimizers.values()}
    step.scalers[overflowing]._scale.fill_(64.0)
    step(batch_of(pipeline))
    assert {float(optimizer.param_groups[0]["lr"]) for optimizer in step.optimizers.values()} == rates
    assert target_bits(pipeline.loss) != targets
    assert (step.updates, step.skipped_steps) == (4, 1)


@both
def test_a_critics_loss_that_is_not_finite_leaves_the_actor_its_step(config):
    pipeline = build(config)
    next(iter(pipeline))
    before = {key: owned_bits(pipeline, key) for key in KEYS}
    batch = batch_of(pipeline)
    batch["next", "reward"].fill_(math.inf)
    metrics = pipeline.step(batch)
    assert {key: metrics[f"skipped_{key}"].item() for key in KEYS} == {
        "loss_actor": 0.0,
        "loss_qvalue": 1.0,
        "loss_alpha": 0.0,
    }
    after = {key: owned_bits(pipeline, key) for key in KEYS}
    assert [after[key] == before[key] for key in KEYS] == [False, True, False]


# ------------------------------------------------------------------------------------------------------------ runs


@both
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_runs(config, precision):
    _, reports = trained(dataclasses.replace(config, precision=precision))
    assert reports[-1].updates == 12
    names = {f"{name}_{key}" for name in ("grad_norm", "skipped", "loss_scale") for key in KEYS}
    assert {*KEYS, *names, "alpha", "entropy"} <= set(reports[-1].metrics)


@both
@pytest.mark.parametrize(
    "options", [{"n_step": 3}, {"prioritized": True}, {"replay_size": 0}, {"target_update": "hard"}]
)
def test_what_recipes_with_a_buffer_share_runs(config, options):
    trained(dataclasses.replace(config, **options))


@both
def test_a_seed_repeats_a_run_and_another_does_not(config):
    first = finish(build(config))
    assert finish(build(config)) == first
    assert finish(build(dataclasses.replace(config, seed=1))) != first


@both
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16", "growth_interval": 2, "collector": "fused"},
        {"normalize_observation": True, "n_step": 2},
        {"prioritized": True, "precision": "fp8"},
    ],
    ids=["fp16", "statistics", "prioritized"],
)
def test_a_resumed_run_ends_bit_identical(config, options, tmp_path):
    whole = check_resuming(dataclasses.replace(config, **options), tmp_path)
    assert torch.isfinite(whole.loss.log_alpha)
    assert whole.step.updates == 12


@pytest.mark.parametrize("options", [{}, {"precision": "fp8", "collector": "fused"}], ids=["fp32", "fp8-fused"])
def test_a_resumed_run_with_state_dependent_noise_ends_bit_identical(options, tmp_path):
    config = dataclasses.replace(CONTINUOUS, state_dependent_noise=True, **options)
    assert check_resuming(config, tmp_path).step.updates == 12
