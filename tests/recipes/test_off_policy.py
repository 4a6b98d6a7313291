"""What the recipes with a replay buffer share: what they refuse, the buffers, the targets, several steps."""

import dataclasses
import math

import pytest
import torch
from runs import REPLAYED, bits, record, target_bits
from torchrl.data import TensorDictPrioritizedReplayBuffer
from torchrl.objectives import HardUpdate, SoftUpdate

from fp8rl_torchrl.data import PackedReplayBuffer
from fp8rl_torchrl.data.multi_step import n_step
from fp8rl_torchrl.recipes import ActorCriticConfig, DQNConfig, SACConfig, TD3Config, build

CONFIGS = [
    DQNConfig(env="CartPole-v1", **REPLAYED),
    SACConfig(env="CartPole-v1", **REPLAYED),
    SACConfig(env="Pendulum-v1", **REPLAYED),
    TD3Config(env="Pendulum-v1", **REPLAYED),
]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.algo}-{config.env}")


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("recipe", [ActorCriticConfig, DQNConfig, SACConfig, TD3Config])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
        ({"replay_size": -1}, "replay_size must be >= 0; got -1"),
        ({"replay_size": 2048, "min_replay": 2049}, "min_replay 2049 would never be stored in replay_size 2048"),
        ({"replay_size": 2048, "batch_size": 2049}, "batch_size 2049 is more than replay_size 2048 holds"),
        (
            {"replay_size": 1024, "num_envs": 1, "frames_per_collection": 2048},
            "replay_size must hold a collection, 2048 transitions",
        ),
        ({"num_envs": 3, "frames_per_collection": 8}, "must be a multiple of num_envs"),  # as for all recipes
    ],
)
def test_a_buffer_that_cannot_be_is_refused(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**options)


@pytest.mark.parametrize("recipe", [DQNConfig, SACConfig, TD3Config])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_step": 0}, "n_step must be >= 1; got 0"),
        ({"n_step": 3, "num_envs": 4, "frames_per_collection": 8}, "n_step 3 needs collections of as many steps; .* 2"),
        ({"target_every": 0}, "target_every must be >= 1; got 0"),
        ({"target_rate": 0.0}, r"target_rate must lie in \(0, 1\]; got 0.0"),
        ({"target_rate": 1.1}, r"target_rate must lie in \(0, 1\]"),
        ({"target_rate": math.nan}, r"target_rate must lie in \(0, 1\]"),
        ({"priority_exponent": -0.1}, r"priority_exponent must lie in \[0, 1\]; got -0.1"),
        ({"importance_exponent": 1.1}, r"importance_exponent must lie in \[0, 1\]; got 1.1"),
        ({"prioritized": True, "replay_size": 0}, "prioritized needs a replay buffer: give replay_size"),
        ({"target_update": "banana"}, "target_update takes one of soft, hard"),
    ],
)
def test_what_cannot_be_run_is_refused(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_the_limits_themselves_can_be_run():
    DQNConfig(replay_size=8, min_replay=8, batch_size=8, num_envs=8, frames_per_collection=8)
    DQNConfig(n_step=2, num_envs=4, frames_per_collection=8, target_rate=1.0)
    DQNConfig(replay_size=0, min_replay=10**6, batch_size=10**6)  # without a buffer, these say nothing


def test_updates_are_counted_for_the_length_of_the_schedules():
    small = {**REPLAYED, "total_frames": 16 * 5, "device": "cpu"}
    assert DQNConfig(**small).resolved().lr_decay_updates == 5 * 3
    assert DQNConfig(**{**small, "replay_size": 0}).resolved().lr_decay_updates == 5, "one for each collection"


# --------------------------------------------------------------------------------------------------------- buffers


@each
def test_the_buffer_is_the_one_asked_for(config):
    uniform = build(config).replay
    assert type(uniform) is PackedReplayBuffer
    assert (uniform.storage.max_size, uniform.batch_size) == (40, 8)
    prioritized = build(dataclasses.replace(config, prioritized=True)).replay
    assert type(prioritized) is TensorDictPrioritizedReplayBuffer
    assert (prioritized.storage.max_size, prioritized.batch_size) == (40, 8)
    assert prioritized.sampler.beta == 0.4
    assert build(dataclasses.replace(config, replay_size=0)).replay is None


@each
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_priority_is_the_magnitude_of_an_error_to_the_power_asked_for(config, exponent):
    """Whatever the loss writes, the error or its square: of one a hundred times as large, it is 100^exponent times."""
    options = {"priority_exponent": exponent, "frames_per_collection": 40, "updates_per_collection": 1}
    pipeline = build(dataclasses.replace(config, prioritized=True, gamma=0.0, lr=1e-9, **options))
    found = []
    for reward in (1e4, 1e6):  # beside which the values of a new network are nothing
        batch = next(iter(pipeline.collector)).select(*pipeline.loss.in_keys).reshape(-1)
        batch["next", "reward"].fill_(reward)
        pipeline.replay.extend(batch)
        sample = pipeline.replay.sample()
        pipeline.step(sample)
        pipeline.replay.update_tensordict_priority(sample)
        found.append(torch.as_tensor(pipeline.replay.sampler._sum_tree[sample["index"]]).mean().item())
    assert found[1] / found[0] == pytest.approx(100**exponent, rel=0.01)


@each
def test_without_a_buffer_each_collection_is_learned_from_once(config):
    pipeline = build(dataclasses.replace(config, replay_size=0))
    batches, _ = record(pipeline)
    reports = list(pipeline)
    assert [report.updates for report in reports] == [1, 2, 3, 4]
    assert [batch.numel() for batch in batches] == [16] * 4
    observed = torch.cat([batch["observation"].reshape(16, -1) for batch in batches])
    assert len(observed.unique(dim=0)) > 60, "what is learned from is new each time"


@each
def test_learning_waits_for_the_minimum_fill(config):
    pipeline = build(dataclasses.replace(config, min_replay=33))
    assert [report.updates for report in pipeline] == [0, 0, 3, 6]  # 16, 32, 48 -> 40, 64 -> 40 stored


# --------------------------------------------------------------------------------------------------------- targets


@each
def test_the_target_follows_as_asked(config):
    soft = build(dataclasses.replace(config, target_rate=0.25)).step.target_updater
    assert type(soft) is SoftUpdate
    assert soft.eps == 0.75
    hard = build(dataclasses.replace(config, target_update="hard", target_every=7)).step.target_updater
    assert type(hard) is HardUpdate
    assert hard.value_network_update_interval == 7


@each
def test_a_hard_target_is_copied_after_so_many_updates(config):
    pipeline = build(dataclasses.replace(config, target_update="hard", target_every=4, lr=0.01))
    pipeline.config = dataclasses.replace(pipeline.config, updates_per_collection=1)
    before, moved = target_bits(pipeline.loss), []
    for report in pipeline:
        if target_bits(pipeline.loss) != before:
            before = target_bits(pipeline.loss)
            moved.append(report.updates)
    assert moved == [4]


# --------------------------------------------------------------------------------------------------- several steps


@each
def test_over_one_step_nothing_is_different(config):
    """A transition over one step, said with ``steps_to_next_obs``, has the loss of a plain one."""
    pipeline = build(config)
    rollout = next(iter(pipeline.collector))
    plain = rollout.select(*pipeline.loss.in_keys).reshape(-1)
    said = n_step(rollout, 1, config.gamma).select(*pipeline.loss.in_keys, "steps_to_next_obs").reshape(-1)
    assert said["steps_to_next_obs"].eq(1).all()
    found = []
    for batch in (plain, said, said.clone().set("steps_to_next_obs", said["steps_to_next_obs"] + 1)):
        torch.manual_seed(0)
        found.append(bits(dict(pipeline.loss(batch).detach().items())))
    assert found[0] == found[1]
    assert found[0] != found[2], "the comparison must be able to fail"


@each
@pytest.mark.parametrize("replay_size", [40, 0])
def test_over_several_steps_rewards_are_summed_and_their_number_is_kept(config, replay_size):
    pipeline = build(dataclasses.replace(config, n_step=3, gamma=0.5, replay_size=replay_size))
    batches, collected = record(pipeline)
    next(iter(pipeline))
    reward, done = (collected[0][0]["next", name].squeeze(-1) for name in ("reward", "done"))
    assert not done.any(), "no episode ends in the first four steps: the sums below are those of whole spans"
    r = reward.double()
    sums = torch.stack(
        [r[:, 0] + r[:, 1] / 2 + r[:, 2] / 4, r[:, 1] + r[:, 2] / 2 + r[:, 3] / 4, r[:, 2] + r[:, 3] / 2, r[:, 3]], 1
    )
    steps = torch.tensor([3, 3, 2, 1]).expand(4, 4)
    expected = {
        (round(total, 4), n) for total, n in zip(sums.flatten().tolist(), steps.flatten().tolist(), strict=True)
    }
    learned = {
        (round(total, 4), n)
        for batch in batches
        for total, n in zip(
            batch["next", "reward"].flatten().tolist(), batch["steps_to_next_obs"].flatten().tolist(), strict=True
        )
    }
    assert learned <= expected
    assert {n for _, n in learned} == {1, 2, 3}
    if replay_size == 0:
        assert learned == expected
