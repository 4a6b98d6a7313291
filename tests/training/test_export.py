"""Export of policies: the files are read again, by this package and without it, and compared with the policy."""

import copy
import functools
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule, QValueActor

import fp8rl_torchrl as f8
from fp8rl_torchrl.training import export
from fp8rl_torchrl.training.export import collect_observations, deterministic_actor, export_policy
from fp8rl_torchrl.training.policy_file import ExportError, compare_exported, read_exported

NO_ONNX = any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(NO_ONNX, reason='ONNX is not installed: pip install "fp8rl_torchrl[export]"')
ENDINGS = ["pt2", pytest.param("onnx", marks=needs_onnx)]
OBSERVATIONS = 2 * torch.randn(500, 2, generator=torch.Generator().manual_seed(1))


class Normalised(nn.Module):
    """A layer with buffers, such as running statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, -1.0], dtype=torch.float64))
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, observation):
        return (observation - self.mean.float()) * self.scale


def encoder():
    return nn.Sequential(Normalised(), nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU())


def actor(action_spec, seed):
    torch.manual_seed(seed)
    agent = f8.ActorCritic(encoder(), None, 32, action_spec)
    with torch.no_grad():
        for parameter in agent.parameters():  # heads start near zero; these choose every action somewhere
            parameter.add_(0.2 * torch.randn_like(parameter))
    return agent.policy


def discrete(seed=0):
    return actor(Categorical(3), seed)


def continuous(seed=0):
    return actor(Bounded(low=torch.tensor([-2.0, -1.0]), high=torch.tensor([2.0, 3.0])), seed)


def best_valued(seed=0):
    """A Q-network followed by exploration, which always acts at random."""
    torch.manual_seed(seed)
    values = QValueActor(nn.Sequential(encoder(), nn.Linear(32, 3)), in_keys=["observation"], spec=Categorical(3))
    return TensorDictSequential(values, EGreedyModule(Categorical(3), eps_init=1.0, eps_end=1.0))


POLICIES = {"discrete": discrete, "continuous": continuous, "best_valued": best_valued}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export a policy by its name, once; returns the report."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def report(name, ending, precision):
        path = folder / f"{name}-{precision}.{ending}"
        return export_policy(POLICIES[name](), OBSERVATIONS, path, precision=precision)

    return report


def chosen(policy, observations=OBSERVATIONS):
    """What the policy itself does, deterministically."""
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return policy(TensorDict({"observation": observations}, batch_size=observations.shape[:1]))


def farthest(got, expected):
    return (got.double() - expected.double()).abs().max().item()


# --- what a file does ---


NUMBERS = {"discrete": ["logits"], "continuous": ["action", "loc", "scale"], "best_valued": ["action_value"]}


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("discrete", "pt2"),
        pytest.param("discrete", "onnx", marks=needs_onnx),
        ("continuous", "pt2"),
        pytest.param("continuous", "onnx", marks=[needs_onnx, pytest.mark.slow]),
        ("best_valued", "pt2"),
        pytest.param("best_valued", "onnx", marks=[needs_onnx, pytest.mark.slow]),
    ],
)
def test_an_fp32_file_does_what_the_policy_does(exported, name, ending):
    numbers = NUMBERS[name]
    report = exported(name, ending, "fp32")
    got, expected = read_exported(report.path)(OBSERVATIONS), chosen(POLICIES[name]())
    assert list(got) == list(dict.fromkeys(["action", *numbers]))
    for each in numbers:
        assert got[each].dtype == torch.float32
        assert got[each].shape == expected[each].shape
        assert farthest(got[each], expected[each]) <= 2e-6 * expected[each].abs().max()
    if "action" not in numbers:
        assert got["action"].dtype == torch.int64
        assert torch.equal(got["action"], expected["action"])
        assert len(got["action"].unique()) > 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_bf16_file_computes_in_bf16(exported, ending):
    report, policy = exported("continuous", ending, "bf16"), continuous()
    got, expected, low = (
        read_exported(report.path)(OBSERVATIONS),
        chosen(policy),
        chosen(f8.twin(policy, "bf16")),
    )
    torch.testing.assert_close(got["scale"], expected["scale"], rtol=0, atol=0)  # a parameter, which nothing rounds
    for name in ("action", "loc"):
        assert got[name].dtype == torch.float32
        off = farthest(got[name], expected[name]) / expected[name].abs().max()
        assert 2**-14 < off < 2**-5, "as far as 8 bits are, and no farther"
        # Kernels that sum in another order round a few activations to the neighbouring number.
        assert (got[name] - low[name]).abs().mean() < 0.05 * (got[name] - expected[name]).abs().mean()
        if ending == "pt2":
            assert torch.equal(got[name], low[name])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_takes_any_batch_size(exported, ending):
    run, policy = read_exported(exported("discrete", ending, "fp32").path), discrete()
    for size in (1, 2, 3, 500):
        got, expected = run(OBSERVATIONS[:size]), chosen(policy, OBSERVATIONS[:size])
        assert got["action"].shape == (size,)
        assert torch.equal(got["action"], expected["action"])


def test_a_bf16_file_stores_the_encoder_in_bf16_and_the_head_in_fp32(exported):
    stored = torch.export.load(exported("continuous", "pt2", "bf16").path).state_dict
    weights = {tuple(each.shape): each.dtype for name, each in stored.items() if name.endswith("weight")}
    assert weights == {(32, 2): torch.bfloat16, (32, 32): torch.bfloat16, (2, 32): torch.float32}


@needs_onnx
def test_a_bf16_onnx_file_does_so_too(exported):
    onnx = pytest.importorskip("onnx")
    stored = onnx.load(exported("continuous", "onnx", "bf16").path).graph.initializer
    weights = {tuple(each.dims): each.data_type for each in stored if each.name.endswith("weight")}
    assert weights == {(32, 2): 16, (32, 32): 16, (2, 32): 1}, "in ONNX 1 is float32, 16 bfloat16"


def run_without(modules, code, *argv):
    """Run code in a Python where some modules cannot be imported; returns what it prints as JSON."""
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in modules)
    command = [sys.executable, "-c", f"import json, sys\n{blocked}\n{code}", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_torch_file_needs_nothing_but_torch(exported):
    code = """
import torch
policy = torch.export.load(sys.argv[1]).module()
print(json.dumps(policy(torch.tensor([[0.5, -1.0], [3.0, 2.0]]))["action"].tolist()))
"""
    path = exported("best_valued", "pt2", "fp32").path
    got = run_without(["fp8rl_torchrl", "torchrl", "tensordict"], code, path)
    assert got == chosen(best_valued(), torch.tensor([[0.5, -1.0], [3.0, 2.0]]))["action"].tolist()


@needs_onnx
def test_an_onnx_file_needs_nothing_but_its_runtime(exported):
    code = """
import numpy, onnxruntime
policy = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
batch = numpy.array([[0.5, -1.0], [3.0, 2.0]], dtype=numpy.float32)
print(json.dumps([policy.get_inputs()[0].shape, policy.run(["action"], {"observation": batch})[0].tolist()]))
"""
    path = exported("discrete", "onnx", "fp32").path
    shape, got = run_without(["fp8rl_torchrl", "torchrl", "tensordict", "torch", "onnx"], code, path)
    assert shape == ["batch", 2]
    assert got == chosen(discrete(), torch.tensor([[0.5, -1.0], [3.0, 2.0]]))["action"].tolist()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_says_nothing_of_the_machine_it_was_made_on(exported, ending):
    with open(exported("discrete", ending, "fp32").path, "rb") as file:
        content = file.read()
    assert b"torch" in content
    for folder in (export.__file__, torch.__file__):
        assert folder.rpartition("/")[0].encode() not in content


# --- the report ---


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    """A policy, its state before it was exported in BF16, and the report."""
    policy = discrete().train()
    before = copy.deepcopy(policy.state_dict())
    path = tmp_path_factory.mktemp("low") / "policy.pt2"
    return policy, before, export_policy(policy, OBSERVATIONS, path, precision="bf16")


def test_the_report_says_how_the_file_compares(low):
    policy, _, report = low
    got, expected = read_exported(report.path)(OBSERVATIONS), chosen(policy)
    action, logits = report.outputs
    assert action.same == (got["action"] == expected["action"]).double().mean()
    assert logits.difference == farthest(got["logits"], expected["logits"]) > 0
    assert (report.format, report.precision, report.observations) == ("torch", "bf16", 500)
    assert json.loads(json.dumps(report.to_dict()))["outputs"][1]["difference"] == logits.difference
    lines = str(report).splitlines()
    assert lines[0] == f"{report.path}: torch, bf16, {report.bytes:,} bytes"
    assert "500 observations" in lines[1]
    assert "5.00%" in lines[1]
    assert lines[2].split() == ["action", f"{action.same:.2%}", "the", "same"]
    assert lines[3].split()[:2] == ["logits", f"{logits.difference:.2g}"]
    assert len(lines) == 4


def test_the_policy_is_left_as_it_is(low):
    policy, before, _ = low
    assert policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())
    after = policy.state_dict()
    assert all(torch.equal(after[name], each) and after[name].dtype == each.dtype for name, each in before.items())


def test_an_fp8_policy_is_exported_without_fp8_and_the_report_says_so(tmp_path):
    policy = discrete()
    f8.convert(policy, "fp8")
    report = export_policy(policy, OBSERVATIONS, tmp_path / "policy.pt2")
    assert report.float8_layers == 1
    assert sum(isinstance(layer, f8.Float8Linear) for layer in policy.modules()) == 1, "the policy keeps its own"
    got = read_exported(report.path)(OBSERVATIONS)
    assert farthest(got["logits"], chosen(discrete())["logits"]) < 1e-5
    in_float8 = farthest(got["logits"], chosen(policy)["logits"])
    assert report.float8_outputs[1].difference == in_float8 > 1e-3
    assert report.outputs[1].difference < 1e-5
    assert "1 of the policy's layers multiply in FP8; in the file they do so in fp32." in str(report)


# --- the check ---


def tampered(actor, observation, trace=export._trace):
    """Trace the actor after one of its weights was changed."""
    layer = next(module for module in actor.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight[0] *= 1.5
    return trace(actor, observation)


@pytest.mark.parametrize(("name", "precision"), [("discrete", "fp32"), ("continuous", "bf16")])
def test_a_file_with_a_changed_weight_is_refused_and_removed(tmp_path, monkeypatch, name, precision):
    monkeypatch.setattr(export, "_trace", tampered)
    path = tmp_path / "policy.pt2"
    with pytest.raises(ExportError, match="the file does not do what the policy does: "):
        export_policy(POLICIES[name](), OBSERVATIONS, path, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_file_replaces_nothing(tmp_path, monkeypatch):
    path = tmp_path / "policy.pt2"
    path.write_text("an older file")
    with monkeypatch.context() as patched:
        patched.setattr(export, "_trace", tampered)
        with pytest.raises(ExportError, match="the file does not do what the policy does"):
            export_policy(discrete(), OBSERVATIONS, path, overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["policy.pt2"]
    assert path.read_text() == "an older file"
    export_policy(discrete(), OBSERVATIONS, path, overwrite=True)
    assert torch.equal(read_exported(path)(OBSERVATIONS)["action"], chosen(discrete())["action"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_file_of_another_policy_is_refused(exported, ending):
    path = exported("discrete", ending, "fp32").path
    for seed, fits in ((0, True), (1, False)):
        arguments = path, deterministic_actor(discrete(seed)), OBSERVATIONS, export.TOLERANCE["bf16"]
        if fits:
            compare_exported(*arguments)
        else:
            with pytest.raises(ExportError, match="the file does not do what the policy does: "):
                compare_exported(*arguments)


def test_the_tolerance_can_be_chosen(tmp_path):
    path = tmp_path / "policy.pt2"
    with pytest.raises(ExportError, match=r"\(1e-06 of the largest value\); bf16 is too coarse .*: export it in fp32"):
        export_policy(continuous(), OBSERVATIONS, path, precision="bf16", tolerance=1e-6)
    with pytest.raises(ExportError, match="tolerance must be >= 0; got -1"):
        export_policy(continuous(), OBSERVATIONS, path, precision="bf16", tolerance=-1)
    assert list(tmp_path.iterdir()) == []


# --- observations ---


def test_observations_are_those_of_an_evaluation():
    env = f8.envs.CustomEnv(num_envs=2, seed=0)
    left = TensorDictModule(
        lambda observation: torch.zeros(observation.shape[:-1], dtype=torch.int64), ["observation"], ["action"]
    )
    observations = collect_observations(left, env, episodes=3, seed=5)
    lengths = f8.evaluate(left, env, 3, seed=5).lengths
    # Three environments side by side, until the last has ended its first episode.
    assert observations.shape == (3 * max(lengths), 2)
    assert torch.equal(observations[:3], env.fresh(num_envs=3, seed=5).reset()["observation"])
    assert len(observations.unique(dim=0)) == len(observations), "every step has a row of its own"
    single = collect_observations(left, f8.envs.CustomEnv(seed=0), episodes=1, seed=5)
    assert single.shape[1:] == (2,)
    assert torch.equal(single[0], observations[0])
