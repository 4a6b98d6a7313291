"""The DQN recipe: its options, its targets and exploration, what double and dueling change, priorities, its runs."""

import dataclasses
import math
import warnings

import pytest
import torch
from runs import PRECISIONS, REPLAYED, batch_of, bits, check_resuming, finish, interrupted, target_bits, trained
from torchrl.objectives import DQNLoss

from fp8rl_torchrl.data.multi_step import n_step
from fp8rl_torchrl.models.q_network import DuelingHead, QNetwork
from fp8rl_torchrl.recipes import DQNConfig, build

SMALL = DQNConfig(env="CartPole-v1", **REPLAYED)
pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")


def small(**options):
    return dataclasses.replace(SMALL, **options)


def online_bits(loss):
    return [value for _, value in sorted(bits(loss.value_network_params.flatten_keys(".").to_dict()).items())]


def target_of(loss):
    return loss.target_value_network_params.flatten_keys(".").data.clone()


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.1}, "0 <= epsilon_final <= epsilon <= 1 must hold; got 0.05 and 1.1"),
        ({"epsilon": 0.01}, "0 <= epsilon_final <= epsilon <= 1 must hold; got 0.05 and 0.01"),
        ({"epsilon_final": -0.1}, "0 <= epsilon_final <= epsilon <= 1 must hold"),
        ({"epsilon": math.nan}, "0 <= epsilon_final <= epsilon <= 1 must hold"),
        ({"epsilon_frames": 0}, "epsilon_frames must be >= 1; got 0"),
        ({"epsilon_decay": 0.0}, r"epsilon_decay must lie in \(0, 1\]; got 0.0"),
        ({"epsilon_decay": 1.01}, r"epsilon_decay must lie in \(0, 1\]"),
        ({"target_every": 0}, "target_every must be >= 1"),
        ({"replay_size": -1}, "replay_size must be >= 0"),  # what recipes with a buffer share is checked, too
        ({"lr": 0.0}, "lr must be > 0"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DQNConfig(**options)


def test_a_continuous_action_is_refused_with_what_to_use():
    with pytest.raises(ValueError, match="for a continuous one use sac, td3 or ppo"):
        build(DQNConfig(env="Pendulum-v1", device="cpu"))


def test_the_guides_options():
    guide = DQNConfig.guide()
    assert guide.env == "CartPole-v1"
    assert (guide.epsilon, guide.epsilon_final) == (1.0, 0.01)
    assert (guide.epsilon_schedule, guide.epsilon_decay) == ("exponential", 0.995)
    assert (guide.target_update, guide.target_every) == ("episodes", 10)
    assert (guide.episodes, guide.total_frames) == (500, None)
    assert (guide.lr, guide.lr_schedule, guide.gamma) == (1e-3, "constant", 0.99)
    assert (guide.replay_size, guide.batch_size, guide.min_replay) == (10_000, 64, 64)
    # one environment, and an update after every step
    assert (guide.num_envs, guide.frames_per_collection, guide.updates_per_collection) == (1, 1, 1)
    assert guide == DQNConfig.variant("guide", "CartPole-v1")
    assert DQNConfig.guide("Acrobot-v1", seed=3, gamma=0.5) == dataclasses.replace(
        guide, env="Acrobot-v1", seed=3, gamma=0.5
    )


def test_the_guide_runs():
    config = DQNConfig.guide(min_replay=20, batch_size=8, hidden=(16,), total_frames=60, device="cpu", compile="off")
    pipeline = build(config)
    reports = list(pipeline)
    assert [report.updates for report in reports[18:22]] == [0, 1, 2, 3]
    assert reports[-1].updates == 41
    assert reports[-1].episodes > 0
    assert pipeline.agent.exploration.eps.item() == pytest.approx(0.995 ** reports[-1].episodes)


# ----------------------------------------------------------------------------------------------------------- parts


def test_it_is_made_of_the_parts_it_names():
    pipeline = build(small(gamma=0.5, loss="l2", double=True))
    assert type(pipeline.agent) is QNetwork
    assert type(pipeline.loss) is DQNLoss
    assert pipeline.loss.double_dqn
    assert pipeline.loss.loss_function == "l2"
    assert pipeline.loss.value_estimator.gamma == 0.5
    assert not any(isinstance(module, DuelingHead) for module in pipeline.agent.modules())
    assert any(isinstance(module, DuelingHead) for module in build(small(dueling=True)).agent.modules())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_loss_by_hand(double, dueling, steps):
    """The square of r + gamma^n Q'(s', a*) - Q(s, a): a* is the target's own best action, or with double, ours."""
    config = small(double=double, dueling=dueling, n_step=steps, gamma=0.5, loss="l2")
    pipeline = build(config)
    list(pipeline)
    torch.manual_seed(0)
    for parameters in (pipeline.loss.value_network_params, pipeline.loss.target_value_network_params):
        parameters.data.apply(lambda value: value.normal_(0, 0.3), inplace=True)  # two networks that disagree
    batch = pipeline.replay.sample(40)
    batch["observation"].normal_()
    batch["next", "observation"].normal_()
    following, values = batch["next"], pipeline.agent.values
    with torch.no_grad():
        with pipeline.loss.value_network_params.to_module(pipeline.loss.value_network):
            own = values(batch.select("observation"))["action_value"]
            ahead = values(following.select("observation"))["action_value"]
        with pipeline.loss.target_value_network_params.to_module(pipeline.loss.value_network):
            targets = values(following.select("observation"))["action_value"]
    best = (ahead if double else targets).argmax(-1, keepdim=True)
    discount = 0.5 ** batch["steps_to_next_obs"].float() if steps > 1 else 0.5
    target = following["reward"] + discount * ~following["terminated"] * targets.gather(-1, best)
    expected = (target - own.gather(-1, batch["action"].unsqueeze(-1))).square().mean()
    assert pipeline.loss(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    # and of what is not asked for it is not the loss
    other = (targets if double else ahead).argmax(-1, keepdim=True)
    assert (other != best).any(), "both would choose the same actions: this would prove nothing"


def test_double_and_dueling_matter():
    ends = []
    for options in ({}, {"double": True}, {"dueling": True}, {"double": True, "dueling": True}):
        *_, report = build(small(lr=0.05, target_rate=0.01, **options))
        ends.append(report.metrics["loss"])
    assert len(set(ends)) == 4


# --------------------------------------------------------------------------------------------------------- targets


def test_a_soft_target_goes_its_part_of_the_way_after_each_update():
    pipeline = build(small(target_rate=0.25, lr=0.01))
    next(iter(pipeline.collector))
    next(iter(pipeline))
    for _ in range(3):
        before = target_of(pipeline.loss)
        pipeline.step(batch_of(pipeline))
        online = pipeline.loss.value_network_params.flatten_keys(".").data
        for name, value in target_of(pipeline.loss).items():
            assert torch.allclose(value, 0.75 * before[name] + 0.25 * online[name], atol=1e-7)
            assert not torch.equal(value, before[name])


def test_a_hard_target_is_copied_after_every_so_many_updates():
    pipeline = build(small(target_update="hard", target_every=5, lr=0.01))
    moved, before, number, step = [], target_bits(pipeline.loss), 0, pipeline.step._update

    def watching(batch, compute_loss):
        nonlocal before, number
        metrics, number = step(batch, compute_loss), number + 1
        if target_bits(pipeline.loss) != before:
            before = target_bits(pipeline.loss)
            assert [v for _, v in sorted(before.items())] == online_bits(pipeline.loss)
            moved.append(number)
        return metrics

    pipeline.step._update = watching
    list(pipeline)
    assert (number, moved) == (12, [5, 10])


def test_a_target_by_episodes_is_copied_when_their_number_is_passed():
    pipeline = build(small(target_update="episodes", target_every=3, lr=0.01, total_frames=16 * 30))
    before, passed, rested = target_bits(pipeline.loss), 0, 0
    for report in pipeline:
        ended = report.episodes - len(report.episode_returns)
        if report.episodes // 3 > ended // 3:
            before, passed = target_bits(pipeline.loss), passed + 1
            assert [v for _, v in sorted(before.items())] == online_bits(pipeline.loss)
        else:
            rested += report.episodes > ended
            assert target_bits(pipeline.loss) == before
    assert passed >= 3
    assert rested >= 3, "an episode that is not the third leaves the target"


def test_no_target_is_announced_as_forgotten():
    """TorchRL warns of targets that it knows of no updater for; by episodes, the recipe moves them itself."""
    for target_update in ("soft", "hard", "episodes"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            next(iter(build(small(target_update=target_update))))


@pytest.mark.parametrize("target_update", ["soft", "hard"])
def test_a_skipped_update_leaves_the_targets_and_the_count(target_update):
    pipeline = build(small(target_update=target_update, target_every=1))
    next(iter(pipeline))
    before, online = target_bits(pipeline.loss), online_bits(pipeline.loss)
    batch = batch_of(pipeline)
    batch["next", "reward"][0] = math.inf
    assert pipeline.step(batch)["skipped"] == 1
    assert (target_bits(pipeline.loss), online_bits(pipeline.loss)) == (before, online)
    assert (pipeline.step.updates, pipeline.step.skipped_steps) == (3, 1)
    pipeline.step(batch_of(pipeline))
    assert target_bits(pipeline.loss) != before


# ----------------------------------------------------------------------------------------------------- exploration


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epsilon_frames": 32, "epsilon_final": 0.5}, lambda report: max(0.5, 1 - 0.5 * report.frames / 32)),
        (
            {"epsilon_schedule": "exponential", "epsilon_decay": 0.5, "epsilon_final": 0.1, "total_frames": 16 * 12},
            lambda report: max(0.1, 0.5**report.episodes),
        ),
    ],
)
def test_epsilon_falls_with_frames_or_episodes(options, expected):
    pipeline, found = build(small(**options)), []
    assert pipeline.agent.exploration.eps == 1.0
    for report in pipeline:
        found.append(pipeline.agent.exploration.eps.item())
        assert found[-1] == pytest.approx(expected(report))
    assert len(set(found)) > 1


@pytest.mark.parametrize("collector", ["torchrl", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_policy_that_collects_explores_less_and_less(precision, collector):
    """Also where it is a second tree of modules, in another precision."""
    config = small(epsilon_frames=16, epsilon_final=0.0, collector=collector, precision=precision)
    pipeline = build(dataclasses.replace(config, rollout_precision=precision))
    best, after = [], pipeline.after_collection

    def watching(rollout, report):
        best.append((rollout["action"] == rollout["action_value"].argmax(-1)).float().mean().item())
        after(rollout, report)

    pipeline.after_collection = watching
    list(pipeline)
    assert 0.2 < best[0] < 0.9
    assert best[1:] == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------------------------------------------- prioritized


def priorities(pipeline):
    return torch.as_tensor(pipeline.replay.sampler._sum_tree[torch.arange(len(pipeline.replay))]).double()


def test_a_batchs_priorities_are_its_errors_after_the_update():
    pipeline = build(small(prioritized=True, priority_exponent=0.5, loss="l2", frames_per_collection=40))
    sampled, update = [], pipeline.step._update

    def recording(batch, compute_loss):
        before = priorities(pipeline)
        metrics = update(batch, compute_loss)
        sampled.append((before, batch["index"].clone(), batch["td_error"].clone()))
        return metrics

    pipeline.step._update = recording
    next(iter(pipeline))
    assert len(sampled) == 3
    now = [*(before for before, _, _ in sampled[1:]), priorities(pipeline)]
    for (before, index, error), after in zip(sampled, now, strict=True):
        assert not torch.equal(before, after)
        untouched = torch.ones(len(after), dtype=torch.bool)
        untouched[index] = False
        assert torch.equal(after[untouched], before[untouched])
        # TorchRL's loss writes squares, so this is the magnitude to the power of a half
        expected = (error.flatten().double() + pipeline.replay.sampler._eps) ** 0.25
        assert torch.allclose(after[index], expected, rtol=1e-5)


def test_a_skipped_update_leaves_the_priorities():
    pipeline = build(small(prioritized=True, precision="fp16"))
    next(iter(pipeline))
    before, scale = priorities(pipeline), pipeline.step.scalers["loss"]._scale
    scale.fill_(2.0**120)
    reports = [next(iter(pipeline))]
    assert reports[0].skipped_steps == 3
    assert torch.equal(priorities(pipeline)[:16], before), "those of the first collection, which is still stored"
    scale.fill_(64.0)
    next(iter(pipeline))
    assert not torch.equal(priorities(pipeline)[8:16], before[8:16])


def test_priorities_weigh_the_loss():
    pipeline = build(small(prioritized=True))
    list(pipeline)
    batch = batch_of(pipeline)
    assert batch["priority_weight"].unique().numel() > 1
    weighted = pipeline.loss(batch.clone())["loss"]
    plain = pipeline.loss(batch.exclude("priority_weight"))["loss"]
    assert weighted != plain


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"dueling": True, "double": True, "n_step": 2}, {"replay_size": 0}, {"prioritized": True}],
    ids=["plain", "all together", "no replay", "prioritized"],
)
def test_every_precision_runs(precision, options):
    _, reports = trained(small(precision=precision, **options))
    assert reports[-1].updates == (4 if "replay_size" in options else 12)
    assert {"loss", "grad_norm", "loss_scale", "skipped"} <= set(reports[-1].metrics)


def test_precisions_and_seeds_differ_and_a_seed_repeats():
    runs = [finish(build(small(**options))) for options in ({}, {"precision": "bf16"}, {"precision": "fp16"})]
    assert runs[0] != runs[1] != runs[2] != runs[0]
    assert finish(build(SMALL)) == runs[0]
    assert finish(build(small(seed=1))) != runs[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_step": 3, "collector": "fused", "precision": "fp16", "growth_interval": 2},
        {"prioritized": True, "dueling": True},
        {"target_update": "episodes", "target_every": 2, "epsilon_schedule": "exponential", "total_frames": 16 * 12},
        {"replay_size": 0, "normalize_observation": True},
    ],
    ids=["plain", "n-step", "prioritized", "by episodes", "no replay"],
)
def test_a_resumed_run_ends_bit_identical(options, tmp_path):
    whole = check_resuming(small(**options), tmp_path)
    if options.get("target_update") == "episodes":
        assert whole.episodes > 4, "targets and ε must have moved"


def test_without_the_priorities_a_resumed_run_ends_elsewhere(tmp_path, monkeypatch):
    """Negative twin: other priorities draw other batches."""
    config = small(prioritized=True, priority_exponent=1.0)
    whole = finish(build(config))
    sampler = type(build(config).replay.sampler)
    load = sampler.loads

    def forgetful(self, path):
        load(self, path)
        self.update_priority(torch.arange(32), torch.ones(32))

    monkeypatch.setattr(sampler, "loads", forgetful)
    found, _ = interrupted(config, tmp_path, 2)
    assert found != whole


def test_one_step_is_the_plain_recipe():
    """n_step=1 adds nothing to a collection, and saying so would change nothing."""
    plain, said = finish(build(SMALL)), build(SMALL)
    before = said.prepare
    said.prepare = lambda rollout: before(n_step(rollout, 1, SMALL.gamma))
    said.keys = [*said.loss.in_keys, "steps_to_next_obs"]
    assert finish(said) == plain
    assert finish(build(small(n_step=2))) != plain
