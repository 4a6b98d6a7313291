"""Planted faults, each of which must be named; and their absence, in which nothing must be."""

import pytest
import torch
from torch import nn

import fp8rl_torchrl as f8
from fp8rl_torchrl.numerics import Recorder
from fp8rl_torchrl.numerics.diagnosis import diagnose
from fp8rl_torchrl.numerics.recorder import LayerNumbers, OperandNumbers, Sample
from fp8rl_torchrl.recipes import config_class


def build(algo="a2c", env="CartPole-v1", precision="fp32", total_frames=1024, **options):
    defaults = {"collector": "torchrl", "compile": "off", "device": "cpu", "seed": 3}
    config = config_class(algo).for_task(env, precision=precision, total_frames=total_frames, **(defaults | options))
    return f8.recipes.build(config)


def diagnosed(pipeline, every=2):
    recorder = Recorder(every).attach(pipeline)
    for _ in pipeline:
        pass
    return recorder.diagnose()


def layers_of(pipeline):
    return {name: layer for name, layer in pipeline.agent.named_modules() if isinstance(layer, nn.Linear)}


@pytest.mark.parametrize(
    ("algo", "env", "options"),
    [
        ("a2c", "CartPole-v1", {"precision": "fp32"}),
        ("a2c", "CartPole-v1", {"precision": "bf16"}),
        ("a2c", "CartPole-v1", {"precision": "fp16"}),
        ("a2c", "CartPole-v1", {"precision": "fp8"}),
        ("a2c", "CartPole-v1", {"precision": "fp8-tensorwise"}),
        ("a2c", "CartPole-v1", {"precision": "fp8-rowwise-gw-hp"}),
        ("ppo", "Pendulum-v1", {"precision": "fp16", "total_frames": 1024}),
        ("dqn", "CartPole-v1", {"precision": "fp8", "min_replay": 256}),
        ("sac", "CartPole-v1", {"precision": "fp8", "total_frames": 256, "min_replay": 64}),
        ("td3", "Pendulum-v1", {"precision": "fp16", "total_frames": 256, "min_replay": 64}),
    ],
)
def test_a_healthy_run_is_called_healthy(algo, env, options):
    found = diagnosed(build(algo, env, **options))
    assert (found.cause, found.layer) == ("none", None), found
    assert str(found).startswith("nothing went wrong in the ")


@pytest.mark.parametrize("place", [0, 1])
def test_overflowing_activations_are_named_with_their_layer(place):
    pipeline = build(precision="fp16", activation="relu")
    name, layer = list(layers_of(pipeline).items())[place]
    layer.bias.data.fill_(1e5)  # finite in FP32, beyond FP16
    found = diagnosed(pipeline)
    assert (found.cause, found.layer) == ("precision", name)
    assert f"% of the outputs of {name} lie beyond fp16, though not in FP32" in str(found)


def test_the_same_activations_are_within_bf16():
    pipeline = build(precision="bf16", activation="relu")
    next(iter(layers_of(pipeline).values())).bias.data.fill_(1e5)
    assert "beyond" not in str(diagnosed(pipeline))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_reward_of_a_million_is_the_tasks_fault(precision):
    pipeline = build(precision=precision)
    recorder = Recorder(2).attach(pipeline)
    seen = recorder.collected

    def collected(rollout):
        rollout["next", "reward"][0] = 1e6
        seen(rollout)

    recorder.collected = collected
    for _ in pipeline:
        pass
    found = recorder.diagnose()
    assert found.cause == "task"
    assert found.layer is None
    assert str(found) == "the task went wrong: a reward of 5e+04 is learned from, beyond 10000; scale or clip rewards"


@pytest.mark.parametrize("entry", ["observation", "reward"])
def test_a_nan_from_the_environment_is_the_tasks_fault(entry):
    pipeline = build(precision="fp16")
    recorder = Recorder(2).attach(pipeline)
    seen = recorder.collected

    def collected(rollout):
        rollout["next", entry][0, 0] = float("nan")
        seen(rollout)

    recorder.collected = collected
    for _ in pipeline:
        pass
    found = recorder.diagnose()
    assert found.cause == "task"
    assert str(found) == f"the task went wrong: the environment returned a {entry} that is not finite"


@pytest.mark.parametrize("scale", [2.0**100, 0.0])
def test_a_dead_scaler_is_named(scale):
    pipeline = build(precision="fp16")
    (scaler,) = pipeline.step.scalers.values()
    scaler.set_backoff_factor(0.999999)
    scaler.scale(torch.ones(()))
    scaler._scale.fill_(scale)
    found = diagnosed(pipeline)
    assert found.cause == "precision"
    assert "loss scale" in str(found)


def test_a_learning_rate_of_a_hundred_is_the_algorithms_fault():
    found = diagnosed(build(lr=100.0, max_grad_norm=None, total_frames=4096))
    assert found.cause == "algorithm"
    assert "learning rate" in str(found) or "not finite in FP32 either" in str(found)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize(("lr", "words"), [(3.0, "the learning rate is too large"), (1e-12, "too small")])
def test_a_bad_learning_rate_is_the_algorithms_fault_in_any_precision(precision, lr, words):
    found = diagnosed(build("dqn", lr=lr, precision=precision, total_frames=4096, min_replay=512))
    assert found.cause == "algorithm"
    assert words in str(found)


def test_a_dead_layer_is_the_algorithms_fault():
    pipeline = build(activation="relu", lr=1e-9)
    name, layer = list(layers_of(pipeline).items())[1]
    layer.bias.data.fill_(-1e3)  # what comes after it is zero for every input
    found = diagnosed(pipeline)
    assert (found.cause, found.layer) == ("algorithm", name)
    assert "no gradient reaches" in str(found)


def test_gradients_that_vanish_in_unscaled_fp16_are_named():
    pipeline = build(precision="fp16", init_scale=2.0**-14, growth_interval=10**6)
    found = diagnosed(pipeline)
    assert found.cause == "precision"
    assert "vanish in fp16 (the loss scale is 6.1e-05)" in str(found)


@pytest.mark.parametrize(
    ("parts", "named", "words"),
    [
        ((0.9, 0.6, 0.1), "second", "60% of the gradients of second vanish in fp8-rowwise"),  # it lost them on the way
        ((0.9, 0.4, 0.1), "first", "90% of the gradients of first vanish in bf16"),
        ((0.4, 0.4, 0.1), None, "nothing went wrong"),
    ],
)
def test_vanishing_gradients_are_blamed_where_backward_meets_them_first(parts, named, words):
    def operand(underflow):
        exact = {"saturation": 0.0, "nonfinite": 0.0, "reference_nonfinite": 0.0, "snr_db": 40.0}
        return OperandNumbers(amax=1.0, underflow=underflow, reference_zero=False, **exact)

    layers = [
        LayerNumbers(
            name=name,
            format=format,
            **{role: operand(0.0) for role in ("activation", "weight", "output")},
            gradient=operand(part),
            update_survival=1.0,
            survival_in_fp32=1.0,
            lost_moments=0.0,
        )
        for name, format, part in zip(("first", "second", "third"), ("bf16", "fp8-rowwise", "bf16"), parts, strict=True)
    ]
    seen = {"call": 0, "frames": 0, "loss": 1.0, "reference_loss": 1.0, "loss_scale": 1.0, "skipped": False}
    found = diagnose([Sample(layers=tuple(layers), **seen)], {"reward": 1.0})
    assert found.layer == named
    assert found.words.startswith(words)


@pytest.mark.parametrize(("low", "cause"), [(torch.float16, "precision"), (torch.bfloat16, "none")])
def test_an_optimizer_whose_state_underflows_is_named(low, cause):
    pipeline = build("ppo", precision="fp16", total_frames=2048)
    (optimizer,) = pipeline.step.optimizers.values()

    def store(optimizer, args, kwargs):
        for state in optimizer.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment].copy_(state[moment].to(low))

    optimizer.register_step_post_hook(store)
    found = diagnosed(pipeline)
    assert found.cause == cause, found
    if cause == "precision":
        assert found.layer in layers_of(pipeline)
        assert "of the optimizer's second moments of" in str(found)


def test_nothing_seen_is_not_called_healthy():
    assert "nothing was seen" in str(diagnose([], {}))
