"""The REINFORCE recipe: its options, what an update learns from, the baseline, and its runs."""

import dataclasses
import math

import pytest
import torch
from runs import PRECISIONS, check_resuming, finish, owned_bits, trained
from torchrl.objectives import ReinforceLoss

from fp8rl_torchrl import ActorCritic
from fp8rl_torchrl.data import FusedCollector
from fp8rl_torchrl.recipes import ReinforceConfig, build

SMALL = ReinforceConfig(
    env="CartPole-v1",
    num_envs=4,
    frames_per_collection=120,  # 30 steps of an environment: most first episodes end
    total_frames=120 * 4,
    hidden=(32, 32),
    precision="fp32",
    init_scale=64.0,
    device="cpu",
    collector="fused",
    compile="off",
)
pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


def small(**options):
    return dataclasses.replace(SMALL, **options)


def prepared(pipeline):
    """A collection, and what is learned from it."""
    rollout = next(iter(pipeline.collector))
    return rollout, pipeline.prepare(rollout.clone())


# ---------------------------------------------------------------------------------------------- options and parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"updates_per_collection": 2},
            "are not options of this recipe, which learns from each collection as it comes",
        ),
        ({"min_replay": 2}, "are not options of this recipe"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\]"),
        ({"num_envs": 3}, "frames_per_collection must be a multiple of num_envs"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReinforceConfig(**options)


@pytest.mark.parametrize("baseline", [False, True])
def test_it_is_made_of_the_parts_it_names(baseline):
    pipeline = build(small(baseline=baseline))
    assert type(pipeline.agent) is ActorCritic
    assert not pipeline.agent.shared
    assert type(pipeline.loss) is ReinforceLoss
    assert pipeline.replay is None
    assert tuple(pipeline.step.optimizers) == (("loss_actor", "loss_value") if baseline else ("loss",))
    assert pipeline.config.updates_per_collection == 1
    assert pipeline.config.lr_decay_updates == 4


@pytest.mark.parametrize("collector", ["torchrl", "fused"])
def test_every_collection_begins_with_new_episodes(collector):
    pipeline = build(small(collector=collector))
    assert (type(pipeline.collector) is FusedCollector) == (collector == "fused")
    first, second = (rollout.clone() for rollout, _ in zip(pipeline.collector, range(2), strict=False))
    for rollout in (first, second):
        assert rollout["step_count"][:, 0].eq(0).all()
    assert not torch.equal(first["observation"][:, 0], second["observation"][:, 0]), "and not with the same ones"


# ------------------------------------------------------------------------------------------ what is learned from


def returns_by_hand(rollout, gamma):
    """For each environment, the discounted rewards to the end of each episode; None where it goes on past the end."""
    reward, done = (rollout["next", name].squeeze(-1).tolist() for name in ("reward", "done"))
    table = []
    for rewards, ends in zip(reward, done, strict=True):
        row, following = [], None
        for r, end in zip(reversed(rewards), reversed(ends), strict=True):
            following = r if end else (None if following is None else r + gamma * following)
            row.append(following)
        table.append(row[::-1])
    return table


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_an_action_is_worth_the_discounted_rewards_to_the_end_of_its_episode(gamma):
    rollout, batch = prepared(build(small(gamma=gamma, normalize_advantage=False)))
    expected = returns_by_hand(rollout, gamma)
    known = [value for row in expected for value in row if value is not None]
    assert 40 < len(known) < 120, "some episodes end, and some go on"
    share = 120 / len(known)  # a mean over all steps is then one over those with a return
    for found, row in zip(batch["advantage"].squeeze(-1).tolist(), expected, strict=True):
        assert found == pytest.approx([0.0 if value is None else value * share for value in row], rel=1e-5)


def test_normalised_returns_have_mean_0_and_deviation_1():
    rollout, batch = prepared(build(small(gamma=0.9)))
    ended = torch.tensor([[value is not None for value in row] for row in returns_by_hand(rollout, 0.9)])
    advantage = batch["advantage"].squeeze(-1)
    assert advantage[~ended].eq(0).all()
    share = ended.sum() / ended.numel()
    known = advantage[ended] * share
    assert known.mean().item() == pytest.approx(0, abs=1e-5)
    assert known.std(correction=0).item() == pytest.approx(1, rel=1e-4)


def test_the_baseline_is_taken_off():
    options = {"gamma": 0.9, "normalize_advantage": False}
    plain, off = build(small(**options)), build(small(baseline=True, **options))
    rollout, learned = prepared(off)
    without = plain.prepare(rollout.clone())
    with torch.no_grad():
        value = off.agent.value(rollout.clone())["state_value"]
    ended = without["advantage"] != 0
    share = ended.numel() / ended.sum()
    expected = torch.where(ended, without["advantage"] - value * share, 0.0)
    assert torch.allclose(learned["advantage"], expected, atol=1e-4)
    assert not torch.allclose(learned["advantage"], without["advantage"], atol=1e-3)
    assert torch.equal(learned["value_target"], torch.where(ended, without["value_target"], value))


@pytest.mark.parametrize("baseline", [False, True])
def test_the_critic_is_trained_only_as_a_baseline(baseline):
    pipeline = build(small(baseline=baseline))
    critic = [parameter.clone() for parameter in pipeline.agent.value.parameters()]
    actor = [parameter.clone() for parameter in pipeline.agent.policy.parameters()]
    list(pipeline)
    assert all(not torch.equal(*pair) for pair in zip(actor, pipeline.agent.policy.parameters(), strict=True))
    moved = [not torch.equal(*pair) for pair in zip(critic, pipeline.agent.value.parameters(), strict=True)]
    assert all(moved) if baseline else not any(moved)


@pytest.mark.parametrize("overflowing", ["loss_actor", "loss_value"])
def test_an_overflow_of_one_loss_does_not_stop_the_other_optimizer(overflowing):
    pipeline = build(small(baseline=True, precision="fp16"))
    next(iter(pipeline))
    (other,) = {"loss_actor", "loss_value"} - {overflowing}
    pipeline.step.scalers[overflowing]._scale.fill_(2.0**126)
    before = {key: owned_bits(pipeline, key) for key in (overflowing, other)}
    _, batch = prepared(pipeline)
    metrics = pipeline.step(batch.select(*pipeline.keys))
    assert (metrics[f"skipped_{overflowing}"], metrics[f"skipped_{other}"]) == (1, 0)
    assert owned_bits(pipeline, overflowing)[0] == before[overflowing][0]
    assert owned_bits(pipeline, other)[0] != before[other][0]
    assert (pipeline.step.updates, pipeline.step.skipped_steps) == (1, 1)


def test_a_collection_in_which_nothing_ends_teaches_nothing():
    pipeline = build(small(frames_per_collection=8, total_frames=8))
    (report,) = pipeline
    assert report.metrics["loss_actor"] == 0
    assert report.metrics["grad_norm"] == 0


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_runs(precision, baseline):
    _, reports = trained(small(precision=precision, baseline=baseline))
    assert [report.updates for report in reports] == [1, 2, 3, 4]
    assert reports[-1].episodes > 8


def test_a_continuous_action_is_learned_too():
    _, reports = trained(small(env="Pendulum-v1", num_envs=2, frames_per_collection=400, total_frames=800))
    assert reports[-1].episodes == 4
    assert math.isfinite(reports[-1].metrics["loss_actor"])


def test_a_seed_repeats_a_run_and_another_does_not():
    first = finish(build(SMALL))
    assert finish(build(SMALL)) == first
    assert finish(build(small(seed=1))) != first


@pytest.mark.parametrize(
    "options",
    [
        {"collector": "torchrl"},
        {"baseline": True, "normalize_observation": True},
        {"baseline": True, "precision": "fp16", "growth_interval": 2},
    ],
    ids=["plain", "statistics", "fp16"],
)
def test_a_resumed_run_ends_bit_identical(options, tmp_path):
    whole = check_resuming(small(**options), tmp_path)
    assert whole.step.updates == 4
