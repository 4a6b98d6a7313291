"""The TD3 recipe, and DDPG: its options, its noise, an actor that steps less often than the critics, and its runs."""

import dataclasses
import itertools
import math

import pytest
import torch
from runs import PRECISIONS, REPLAYED, batch_of, bits, check_resuming, finish, owned_bits, target_bits, trained
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import TD3Loss

from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.recipes import TD3Config, build

SMALL = TD3Config(env="Pendulum-v1", **REPLAYED)
DDPG = TD3Config.variant("ddpg", "Pendulum-v1", **REPLAYED)
pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


def small(**options):
    return dataclasses.replace(SMALL, **options)


# ---------------------------------------------------------------------------------------------- options and parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.1}, "noise must be >= 0 and finite; got -0.1"),
        ({"noise": math.inf}, "noise must be >= 0 and finite; got inf"),
        ({"noise_final": -0.2}, "noise_final must be >= 0 and finite; got -0.2"),
        ({"noise_frames": 0}, "noise_frames must be >= 1; got 0"),
        ({"target_noise": math.nan}, "target_noise must be >= 0"),
        ({"target_noise_clip": -1.0}, "target_noise_clip must be >= 0 and finite; got -1.0"),
        ({"actor_every": 0}, "actor_every must be >= 1; got 0"),
        ({"critics": 0}, "critics must be >= 1; got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TD3Config(**options)


def test_a_discrete_action_is_refused():
    with pytest.raises(ValueError, match="a deterministic actor needs a bounded continuous action"):
        build(TD3Config(env="CartPole-v1", device="cpu"))


@pytest.mark.parametrize(("config", "critics", "every"), [(SMALL, 2, 2), (DDPG, 1, 1)], ids=["td3", "ddpg"])
def test_it_is_made_of_the_parts_it_names(config, critics, every):
    pipeline = build(dataclasses.replace(config, gamma=0.5))
    assert type(pipeline.agent) is ActorQ
    assert type(pipeline.loss) is TD3Loss
    assert pipeline.loss.num_qvalue_nets == critics
    assert pipeline.loss.value_estimator.gamma == 0.5
    assert pipeline.step.every == {"loss_actor": every}
    assert tuple(pipeline.step.optimizers) == ("loss_actor", "loss_qvalue")
    trainable = sum(leaf.numel() for leaf in pipeline.step._gradients.leaves["loss_qvalue"])
    assert trainable == critics * sum(parameter.numel() for parameter in pipeline.agent.qvalue.parameters())


def test_ddpg_is_the_special_case():
    assert (DDPG.critics, DDPG.actor_every, DDPG.target_noise) == (1, 1, 0.0)
    assert TD3Config.variant("ddpg", "Pendulum-v1", critics=2).critics == 2


# ----------------------------------------------------------------------------------------------------------- noise


def test_noise_is_in_units_of_half_the_actions_interval():
    pipeline = build(small(noise=0.5, target_noise=0.25, target_noise_clip=0.75))
    # Pendulum's torque lies in -2 to 2
    assert pipeline.loss.policy_noise == 0.5
    assert pipeline.loss.noise_clip == 1.5
    observation = pipeline.env.reset()["observation"][:1].expand(4000, -1).contiguous()
    rows = pipeline.env.reset().select("observation")[:1].expand(4000).clone().set("observation", observation)
    torch.manual_seed(0)
    with torch.no_grad():
        explored = pipeline.agent.policy(rows.clone())["action"]
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            plain = pipeline.agent.policy(rows.clone())["action"]
    assert plain.unique().numel() == 1
    assert explored.std().item() == pytest.approx(1.0, rel=0.1)  # 0.5 x 2, of which 2 in 100 meet a bound
    assert explored.abs().max() <= 2


def test_noise_falls_with_the_frames_that_were_collected():
    pipeline = build(small(noise=2.0, noise_final=0.5, noise_frames=4 * SMALL.frames_per_collection, total_frames=None))
    found = [pipeline.agent.exploration.sigma.item()]
    found += [pipeline.agent.exploration.sigma.item() for _ in itertools.islice(pipeline, 6)]
    assert pipeline.frames == 6 * SMALL.frames_per_collection
    assert found == [2.0, 1.625, 1.25, 0.875, 0.5, 0.5, 0.5]
    assert TD3Config(noise=0.3).noise_after(10**6) == 0.3  # unless it is said


def test_without_noise_the_policy_does_not_explore():
    pipeline = build(small(noise=0.0))
    rollout = next(iter(pipeline.collector))
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        assert torch.equal(pipeline.agent.policy(rollout.select("observation"))["action"], rollout["action"])


def test_the_targets_action_is_smoothed_unless_it_is_said():
    """The critics' loss of one batch depends on what is drawn, but not where there is no noise."""
    for config, differs in ((SMALL, True), (small(target_noise=0.0), False), (small(target_noise_clip=0.0), False)):
        pipeline = build(config)
        next(iter(pipeline))
        batch, found = batch_of(pipeline), set()
        for seed in range(3):
            torch.manual_seed(seed)
            found.add(pipeline.loss(batch.clone())["loss_qvalue"].item())
        assert (len(found) > 1) == differs


# ----------------------------------------------------------------------------------------------- the delayed actor


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_actor_steps_at_every_so_many_updates_of_the_critics(every):
    pipeline = build(small(actor_every=every))
    moved, critics, step = [], [], pipeline.step._update

    def watching(batch, compute_loss):
        before = [owned_bits(pipeline, key) for key in ("loss_actor", "loss_qvalue")]
        metrics = step(batch, compute_loss)
        after = [owned_bits(pipeline, key) for key in ("loss_actor", "loss_qvalue")]
        moved.append(after[0] != before[0])
        critics.append(after[1] != before[1])
        return metrics

    pipeline.step._update = watching
    reports = list(pipeline)
    assert moved == [number % every == 0 for number in range(12)]
    assert all(critics)
    assert reports[-1].updates == 12, "the updates of the critics count"


def test_the_targets_follow_every_update():
    pipeline = build(small(target_rate=0.25))
    next(iter(pipeline))
    for _ in range(4):
        before = {name: value.clone() for name, value in pipeline.loss.state_dict().items() if "params" in name}
        pipeline.step(batch_of(pipeline))
        after = pipeline.loss.state_dict()
        for name, value in before.items():
            if name.startswith("target_"):
                online = after[name.removeprefix("target_")]
                assert torch.allclose(after[name], 0.75 * value + 0.25 * online, atol=1e-7)


@pytest.mark.parametrize("overflowing", ["loss_actor", "loss_qvalue"])
def test_an_overflow_of_one_loss_does_not_stop_the_other_optimizer(overflowing):
    pipeline = build(small(precision="fp16", actor_every=1))
    next(iter(pipeline))
    (other,) = {"loss_actor", "loss_qvalue"} - {overflowing}
    pipeline.step.scalers[overflowing]._scale.fill_(2.0**126)
    before, targets = {key: owned_bits(pipeline, key) for key in (overflowing, other)}, target_bits(pipeline.loss)
    metrics = pipeline.step(batch_of(pipeline))
    assert (metrics[f"skipped_{overflowing}"], metrics[f"skipped_{other}"]) == (1, 0)
    assert owned_bits(pipeline, overflowing) == before[overflowing]
    assert owned_bits(pipeline, other) != before[other]
    assert pipeline.step.scalers[overflowing].get_scale() == 2.0**125
    assert pipeline.step.scalers[other].get_scale() == 64.0
    assert target_bits(pipeline.loss) == targets
    assert (pipeline.step.updates, pipeline.step.skipped_steps) == (3, 1)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("config", [SMALL, DDPG], ids=["td3", "ddpg"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_runs(config, precision):
    _, reports = trained(dataclasses.replace(config, precision=precision))
    assert reports[-1].updates == 12
    assert {"loss_actor", "loss_qvalue", "skipped_loss_actor", "loss_scale_loss_qvalue"} <= set(reports[-1].metrics)


@pytest.mark.parametrize(
    "options", [{"n_step": 3}, {"prioritized": True}, {"replay_size": 0}, {"target_update": "hard"}]
)
def test_what_recipes_with_a_buffer_share_runs(options):
    trained(small(**options))


def test_a_seed_repeats_a_run_and_another_does_not():
    first = finish(build(SMALL))
    assert finish(build(SMALL)) == first
    assert finish(build(small(seed=1))) != first
    assert finish(build(DDPG)) != first


@pytest.mark.parametrize("stopped_after", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16", "growth_interval": 2},
        {"collector": "fused", "n_step": 2, "prioritized": True},
        {"normalize_observation": True, "target_update": "hard", "target_every": 5},
    ],
    ids=["fp16", "n-step prioritized", "statistics"],
)
def test_a_resumed_run_ends_bit_identical(options, stopped_after, tmp_path):
    """Three updates a collection: after one, the actor is to step next but one; after two, next."""
    whole = check_resuming(small(**options), tmp_path, stopped_after)
    assert bits(whole.step.state_dict()["calls"]) == 12
