import math

import pytest
import torch

import fp8rl_torchrl as f8
from fp8rl_torchrl.numerics import Recorder
from fp8rl_torchrl.recipes import config_class


def build(algo="a2c", env="CartPole-v1", precision="fp32", total_frames=512, **options):
    defaults = {"collector": "torchrl", "compile": "off", "device": "cpu", "seed": 3}
    config = config_class(algo).for_task(env, precision=precision, total_frames=total_frames, **(defaults | options))
    return f8.recipes.build(config)


def recorded(every=4, **options):
    pipeline = build(**options)
    recorder = Recorder(every).attach(pipeline)
    for _ in pipeline:
        pass
    return recorder


# Signal over the noise of rounding to nearest, with k bits behind the point, is 6.02 k + 10.8 dB for numbers spread
# evenly over a binade (the error is uniform, so its square is 2^-2k / 12 of the step), and up to 1.5 dB more or less
# for other distributions.
@pytest.mark.parametrize(("precision", "bits"), [("bf16", 7), ("fp16", 10)])
def test_weights_have_the_noise_of_their_format(precision, bits):
    weights = [layer.weight for layer in recorded(precision=precision).samples()[-1].layers if layer.format != "fp32"]
    assert weights
    for weight in weights:
        assert weight.snr_db == pytest.approx(6.02 * bits + 13.0, abs=2.5)
        assert weight.underflow == weight.saturation == weight.nonfinite == 0


@pytest.mark.parametrize("precision", ["fp8", "fp8-tensorwise"])
def test_fp8_layers_have_the_noise_of_e4m3_and_the_others_that_of_their_own_format(precision):
    layers = {layer.format: layer for layer in recorded(precision=precision).samples()[-1].layers}
    name = {"fp8": "fp8-rowwise", "fp8-tensorwise": "fp8-tensorwise"}[precision]
    assert set(layers) == {"bf16", "fp32", name}
    assert layers[name].weight.snr_db == pytest.approx(6.02 * 3 + 13.0, abs=2.5)
    assert layers["bf16"].weight.snr_db > 50
    assert layers["fp32"].weight.snr_db == math.inf


def test_fp32_is_its_own_reference():
    for sample in recorded().samples():
        assert sample.loss == pytest.approx(sample.reference_loss, rel=1e-6)
        for layer in sample.layers:
            assert layer.activation.snr_db == math.inf
            assert layer.gradient.snr_db > 120


ALGORITHMS = [
    ("a2c", "CartPole-v1"),
    ("ppo", "Pendulum-v1"),
    ("dqn", "CartPole-v1"),
    ("sac", "Pendulum-v1"),
    ("sac", "CartPole-v1"),
    ("td3", "Pendulum-v1"),
    ("actor-critic", "CartPole-v1"),
    ("reinforce", "CartPole-v1"),
]


@pytest.mark.parametrize(("algo", "env"), ALGORITHMS)
def test_every_trained_layer_of_every_recipe_is_seen(algo, env):
    options = {"min_replay": 64} if algo in ("dqn", "sac", "td3", "actor-critic") else {}
    pipeline = build(algo, env, "fp8", total_frames=4096 if algo == "reinforce" else 600, **options)
    recorder = Recorder(1).attach(pipeline)
    for _ in pipeline:
        if pipeline.step.updates > 3:
            break
    layers = {layer.name for layer in recorder.samples()[0].layers}
    trained = {
        id(view)
        for optimizer in pipeline.step.optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for view in getattr(parameter, "views", [parameter])
    }
    named = {**dict(pipeline.loss.named_parameters()), **dict(pipeline.agent.named_parameters())}
    weights = {name for name, p in named.items() if id(p) in trained and name.endswith("weight")}
    pointers = {p.data_ptr() for name, p in named.items() if name in weights}
    seen = {p.data_ptr() for name, p in named.items() if name.removesuffix(".weight") in layers}
    assert pointers <= seen


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
@pytest.mark.parametrize(("algo", "env"), [("a2c", "CartPole-v1"), ("ppo", "Pendulum-v1"), ("sac", "Pendulum-v1")])
def test_training_is_the_same_to_the_bit(algo, env, precision):
    options = (
        {"min_replay": 64, "total_frames": 128}
        if algo == "sac"
        else {"total_frames": 1024, **({"epochs": 1} if algo == "ppo" else {})}
    )
    found = []
    for recorder in (None, Recorder(1)):
        pipeline = build(algo, env, precision, **options)
        if recorder is not None:
            recorder.attach(pipeline)
        for _ in pipeline:
            pass
        found.append([*pipeline.agent.parameters(), *pipeline.loss.parameters(), torch.get_rng_state()])
    assert recorder is not None
    assert len(recorder.samples()) > 3
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_one_update_in_so_many_is_looked_at():
    calls = [sample.call for sample in recorded(every=5, total_frames=64 * 12).samples()]
    assert calls == [0, 5, 10]


def test_the_whole_change_arrives_in_fp32_weights():
    for sample in recorded(precision="bf16").samples():
        for layer in sample.layers:
            assert layer.update_survival == pytest.approx(1, abs=1e-3)


def test_a_part_of_the_change_is_lost_by_weights_of_few_bits():
    pipeline = build()
    recorder = Recorder(2)

    def store_in_bf16(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.copy_(parameter.data.bfloat16())

    for optimizer in pipeline.step.optimizers.values():
        optimizer.register_step_post_hook(store_in_bf16)
    for group in next(iter(pipeline.step.optimizers.values())).param_groups:
        group["lr"].fill_(1e-6)
    pipeline.step._base_lr[0][0].fill_(1e-6)
    recorder.attach(pipeline)
    for _ in pipeline:
        pass
    # Weights of 0.1 to 1 are 2^-11 to 2^-8 apart in BF16, and a step is 1e-6.
    last = recorder.samples()[-1].layers
    assert last[1].update_survival < 0.2
    found = recorder.diagnose()
    assert found.cause == "precision"
    assert "arrives" in str(found)


def test_a_compiled_update_is_seen_as_an_eager_one():
    one, other = (recorded(compile=mode, total_frames=512).samples()[1] for mode in ("off", "on"))
    for eager, compiled in zip(one.layers, other.layers, strict=True):
        assert compiled.activation.amax == pytest.approx(eager.activation.amax, rel=1e-4)
        assert compiled.gradient.amax == pytest.approx(eager.gradient.amax, rel=1e-3)
        assert compiled.update_survival == pytest.approx(1, abs=1e-3)


def test_samples_can_be_written_as_json():
    import json

    sample = recorded(precision="fp8").samples()[0].to_dict()
    assert json.loads(json.dumps(sample, allow_nan=False))["layers"][0]["name"]


def test_only_a_pipeline_can_be_attached_to():
    with pytest.raises(TypeError, match=r"attach takes a fp8rl_torchrl\.Pipeline; got a int"):
        Recorder().attach(3)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_must_be_a_positive_integer(every):
    with pytest.raises(ValueError, match="every must be an integer >= 1"):
        Recorder(every)


def test_one_recorder_looks_on_at_one_pipeline():
    pipeline = build()
    recorder = Recorder().attach(pipeline)
    with pytest.raises(RuntimeError, match="attached"):
        recorder.attach(build())
    with pytest.raises(RuntimeError, match="already: detach that one first"):
        Recorder().attach(pipeline)
    recorder.detach()
    assert pipeline.observer is None
    Recorder().attach(pipeline)
