"""The default recipe in FP8: which layers, which policy collects, what is stored, what is logged."""

import dataclasses

import pytest
import torch
from torch import nn

from fp8rl_torchrl import ActorCritic, Float8Linear, evaluate
from fp8rl_torchrl.precision import ConversionError, Twin, linear_function
from fp8rl_torchrl.recipes import ActorCriticConfig, build

SMALL = ActorCriticConfig(
    num_envs=4,
    frames_per_collection=64,
    total_frames=64 * 4,
    min_replay=64,
    updates_per_collection=4,
    hidden=(32, 32),
    precision="fp8",
    device="cpu",
)
RECIPES = {"fp8": "rowwise", "fp8-tensorwise": "tensorwise", "fp8-rowwise-gw-hp": "rowwise-gw-hp"}


def small(**options):
    return dataclasses.replace(SMALL, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_the_hidden_layer_multiplies_in_fp8(name):
    pipeline = build(small(precision=name))
    layers = [layer for layer in pipeline.agent.modules() if isinstance(layer, nn.Linear)]
    assert [getattr(layer, "recipe", None) for layer in layers] == [None, RECIPES[name], None, None]
    assert [each.reason for each in pipeline.conversion.layers] == [
        "a dimension under 16",
        None,
        "last layer of a network",
        "last layer of a network",
    ]
    assert pipeline.step.precision.name == name
    reports = list(pipeline)
    assert reports[-1].updates == 16
    assert reports[-1].skipped_steps == 0


def test_another_precision_converts_nothing():
    assert build(small(precision="bf16")).conversion is None


@pytest.mark.parametrize(
    ("learner", "rollout", "collects_in"),
    [
        ("bf16", None, "fp32"),
        ("fp16", None, "fp32"),
        ("fp8", None, "fp8"),
        ("fp8-tensorwise", None, "fp8-tensorwise"),
        ("fp8", "fp32", "fp32"),
        ("fp8", "bf16", "bf16"),
        ("fp8", "fp8-tensorwise", "fp8-tensorwise"),
        ("fp32", "fp8", "fp8"),
        ("bf16", "bf16", "bf16"),
    ],
)
def test_the_precision_that_collects(learner, rollout, collects_in):
    config = small(precision=learner, rollout_precision=rollout)
    assert config.resolved().rollout_precision == collects_in
    pipeline = build(config)
    policy, agent = pipeline.collector.policy, pipeline.agent
    if collects_in == "fp32" and not learner.startswith("fp8"):
        assert policy is agent.policy
        return
    assert isinstance(policy, Twin)
    assert policy.precision.name == collects_in
    assert [layer.recipe for layer in policy.modules() if isinstance(layer, Float8Linear)] == (
        [RECIPES[collects_in]] if collects_in in RECIPES else []
    )
    of_the_agent = {id(parameter) for parameter in agent.parameters()}
    assert all(id(parameter) in of_the_agent for parameter in policy.parameters())
    next(iter(pipeline))


def test_a_rollout_alone_in_fp8_takes_its_options():
    config = small(precision="bf16", rollout_precision="fp8", hidden=(32, 32, 32), fp8_base="fp32", fp8_skip=("*.2",))
    pipeline = build(config)
    assert pipeline.conversion is None
    assert pipeline.collector.policy.precision.base == "fp32"
    assert [isinstance(e, Float8Linear) for e in pipeline.collector.policy.modules()].count(True) == 1
    assert not any(isinstance(each, Float8Linear) for each in pipeline.agent.modules())
    next(iter(pipeline))


@pytest.mark.parametrize("rollout", ["fp32", "fp8"])
def test_the_stored_log_probability_is_the_rollouts_own(rollout):
    pipeline = build(small(rollout_precision=rollout, updates_per_collection=1, lr=1e-12, total_frames=64))
    next(iter(pipeline))
    stored = pipeline.replay[:]
    with torch.no_grad():
        own = pipeline.collector.policy.get_dist(stored).log_prob(stored["action"])
    assert (own - stored["action_log_prob"]).abs().max() < 1e-6
    with torch.no_grad(), pipeline.step.precision.autocast("cpu"):
        learners = pipeline.agent.policy.get_dist(stored).log_prob(stored["action"])
    differs = (learners - stored["action_log_prob"]).abs().max() > 1e-6
    assert differs == (rollout == "fp32")


def test_the_gap_between_rollout_and_learner_is_reported():
    same = list(build(SMALL))[-1].metrics
    other = list(build(small(rollout_precision="fp32")))[-1].metrics
    assert same["rollout_ratio_error"] < 1e-6 < other["rollout_ratio_error"]
    assert same["rollout_kl"] < 1e-9 < other["rollout_kl"]


def test_the_same_seed_gives_the_same_run():
    runs = [[(r.frames, r.episode_returns, tuple(r.metrics.items())) for r in build(SMALL)] for _ in range(2)]
    assert repr(runs[0]) == repr(runs[1])


def test_evaluation_leaves_no_trace():
    curves = []
    for evaluated in (False, True):
        pipeline = build(SMALL)
        curve = []
        for report in pipeline:
            curve.append(repr(sorted(report.metrics.items())))
            if evaluated:
                evaluate(pipeline.agent.policy, pipeline.env, episodes=2)
        curves.append(curve)
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": (8, 8)}, ConversionError, "every linear layer would stay in high precision"),
        ({"fp8_skip": ("nothing",)}, ConversionError, "skip='nothing' matches no linear layer"),
        ({"fp8_skip": ("*",)}, ConversionError, r"matched by skip='\*'"),
        ({"fp8_backend": "fast"}, ValueError, "backend must be"),
        ({"fp8_base": "fp16"}, ValueError, "base must be"),
        ({"precision": "bf16", "fp8_base": "fp32"}, ValueError, "options of the fp8 precisions"),
        ({"precision": "bf16", "fp8_skip": ("*",)}, ValueError, "fp8_skip are options of the fp8 precisions"),
        ({"fp8_backend": "native"}, ValueError, "needs FP8 hardware, and a CPU has none"),
        ({"rollout_precision": "banana"}, ValueError, "unknown precision 'banana'"),
    ],
)
def test_what_cannot_be_run_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        build(small(**options))


def test_weights_are_cast_once_for_a_whole_collection(monkeypatch):
    """Eight steps of the policy, one cast of its weight, until the weight changes."""
    casts, real = [], linear_function.quantize

    def spy(x, cast):
        casts.append(tuple(x.shape))
        return real(x, cast)

    monkeypatch.setattr(linear_function, "quantize", spy)
    env_steps = SMALL.frames_per_collection // SMALL.num_envs
    pipeline = build(SMALL)
    experience = iter(pipeline.collector)
    next(experience)
    assert casts.count((32, 32)) == 1
    assert casts.count((4, 32)) >= env_steps
    next(experience)
    assert casts.count((32, 32)) == 1
    hidden = next(layer for layer in pipeline.agent.modules() if isinstance(layer, Float8Linear))
    hidden.weight.data.add_(0.1)  # behind the version counter's back, as TorchRL's updaters write
    next(experience)
    assert casts.count((32, 32)) == 2


def test_an_agent_is_converted_in_place_on_its_own_parameters():
    plain = build(small(precision="fp32"))
    fp8 = build(SMALL)
    assert isinstance(fp8.agent, ActorCritic)
    assert list(plain.agent.state_dict()) == list(fp8.agent.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.agent.parameters(), fp8.agent.parameters(), strict=True))
