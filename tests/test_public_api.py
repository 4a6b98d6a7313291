"""The public names: they exist, are documented, their examples run; and what the default run is made of."""

import doctest
import importlib
import inspect
import pkgutil
import warnings
from pathlib import Path

import pytest
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import LossModule
from torchrl.trainers import OptimizationStepper

import fp8rl_torchrl as f8

NAMES = {
    "ActorCritic": "models.actor_critic",
    "EvalResult": "training.evaluate",
    "Float8Linear": "precision.linear",
    "OptimStep": "training.step",
    "Pipeline": "training.loop",
    "Precision": "precision.mode",
    "convert": "precision.convert",
    "evaluate": "training.evaluate",
    "twin": "precision.twin",
    "envs.AcrobotEnv": "envs.classic_control.acrobot",
    "envs.CartPoleEnv": "envs.classic_control.cart_pole",
    "envs.CustomEnv": "envs.custom",
    "envs.MountainCarContinuousEnv": "envs.classic_control.mountain_car",
    "envs.MountainCarEnv": "envs.classic_control.mountain_car",
    "envs.NativeEnv": "envs.native",
    "envs.PendulumEnv": "envs.classic_control.pendulum",
    "envs.make": "envs.gym",
    "envs.check_env": "envs.conformance",
    "envs.EnvConformanceError": "envs.conformance",
    "data.FusedCollector": "data.fused",
    "data.n_step": "data.multi_step",
    "data.prioritized_replay_buffer": "data.replay",
    "models.ActorQ": "models.actor_q",
    "models.StateDependentNoise": "models.exploration",
    "models.QNetwork": "models.q_network",
    "models.RunningStatistics": "models.normalize",
    "objectives.ReturnsToGo": "objectives.returns_to_go",
    "data.PackedReplayBuffer": "data.packed",
    "objectives.JointClipPPOLoss": "objectives.ppo",
    "objectives.ReplayedActorCriticLoss": "objectives.replayed_actor_critic",
    "objectives.RolloutA2CLoss": "objectives.a2c",
    "objectives.RolloutAdvantage": "objectives.advantages",
    "recipes.build": "recipes",
    "recipes.A2CConfig": "recipes.a2c",
    "recipes.DQNConfig": "recipes.dqn",
    "recipes.ReinforceConfig": "recipes.reinforce",
    "recipes.SACConfig": "recipes.sac",
    "recipes.TD3Config": "recipes.td3",
    "training.export.export_policy": "training.export",
    "training.policy_file.read_exported": "training.policy_file",
    "recipes.ActorCriticConfig": "recipes.actor_critic",
    "recipes.PPOConfig": "recipes.ppo",
    "training.flat.FlatParameter": "training.flat",
}
PARTS = ["data", "envs", "models", "numerics", "objectives", "precision", "recipes", "training"]


def modules():
    """Every module of the package, imported."""
    names = [info.name for info in pkgutil.walk_packages(f8.__path__, "fp8rl_torchrl.")]
    return [f8, *(importlib.import_module(name) for name in names)]


def attribute(path):
    found = f8
    for name in path.split("."):
        found = getattr(found, name)
    return found


# --- names ---


@pytest.mark.parametrize("path", NAMES)
def test_the_name_is_where_it_should_be(path):
    found = attribute(path)
    assert callable(found)
    assert found.__module__ == ("fp8rl_torchrl." + NAMES[path])
    assert found.__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_can_be_reached(name):
    assert getattr(f8, name) is importlib.import_module(f"fp8rl_torchrl.{name}")


@pytest.mark.parametrize("package", [f8, f8.envs])
def test_dir_lists_what_is_offered(package):
    offered = set(dir(package))
    assert set(package.__all__) == {name for name in offered | set(package.__all__) if not name.startswith("_")}
    # What was imported eagerly needs no entry of its own; all else can be had.
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_dir_of_the_package_names_all_of_it():
    assert {name for name in NAMES if "." not in name} | set(PARTS) == set(f8.__all__)


@pytest.mark.parametrize(
    ("package", "name", "offer"),
    [(f8, "Precison", "ActorCritic, EvalResult, .*Precision"), (f8.envs, "CartPole", "CartPoleEnv, .*check_env, make")],
)
def test_an_unknown_name_is_refused_with_those_that_exist(package, name, offer):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; it offers .*{offer}"):
        getattr(package, name)
    assert not hasattr(package, name)


def test_what_every_package_exports_exists():
    for module in modules():
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_the_version_is_that_of_the_distribution():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{f8.__version__}"\n' in project


# --- docstrings ---


def undocumented(module):
    """Public classes, functions, methods and properties of a module that lack a docstring of their own."""
    if not (module.__doc__ or "").strip():
        yield module.__name__
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(member):
            yield from (f"{module.__name__}.{name}" for _ in range(not _documented(member.__dict__.get("__doc__"))))
            for attribute_name, value in vars(member).items():
                value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
                method = inspect.isfunction(value) and value.__qualname__.startswith(f"{member.__qualname__}.")
                if method and not attribute_name.startswith("_") and not _documented(value.__doc__):
                    yield f"{module.__name__}.{name}.{attribute_name}"
        elif inspect.isfunction(member) and not _documented(member.__doc__):
            yield f"{module.__name__}.{name}"


def _documented(text):
    # Dataclasses without a docstring get their signature, which documents nothing.
    return bool(text and text.strip()) and "(" not in text.split("\n")[0].split(" ")[0]


def test_everything_public_has_a_docstring():
    assert not [name for module in modules() for name in undocumented(module)]


def test_a_missing_docstring_is_found():
    module = type(f8)("planted", "A module.")
    source = (
        "from dataclasses import dataclass\n"
        "def documented():\n    'Says what it does.'\n"
        "def bare(): ...\n"
        "class Documented:\n    'Says what it is.'\n    def method(self): ...\n"
        "    @property\n    def value(self): ...\n"
        "    @classmethod\n    def make(cls): ...\n    def _private(self): ...\n"
        "class Bare: ...\n"
        "@dataclass\nclass Fields:\n    x: int = 0\n"
    )
    exec(source, vars(module))
    assert set(undocumented(module)) == {
        "planted.bare",
        "planted.Documented.method",
        "planted.Documented.value",
        "planted.Documented.make",
        "planted.Bare",
        "planted.Fields",
    }


# --- examples ---


def with_examples():
    tests = [test for module in modules() for test in doctest.DocTestFinder().find(module) if test.examples]
    return {test.name: test for test in tests}


EXAMPLES = with_examples()


def test_there_are_examples():
    for name in ("ActorCritic", "Precision", "OptimStep", "evaluate", "envs.CustomEnv", "envs.make", "envs.check_env"):
        found = attribute(name)
        assert any(test.startswith(f"{found.__module__}.{found.__name__}") for test in EXAMPLES), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name):
    report, runner = [], doctest.DocTestRunner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = runner.run(EXAMPLES[name], out=report.append)
    assert result.attempted
    assert not result.failed, "".join(report)


def test_a_wrong_example_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "planted", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1


# --- the default run ---


@pytest.fixture(scope="module")
def default():
    pipeline = f8.recipes.build(f8.recipes.ActorCriticConfig(device="cpu"))
    yield pipeline
    pipeline.collector.shutdown()


def test_the_default_environment(default):
    assert type(default.env) is f8.envs.CustomEnv
    assert default.env.observation_spec["observation"].shape[-1] == 2
    assert default.env.action_spec.n == 2
    assert default.env.dynamics.max_steps == 200


def test_the_default_agent_is_tensordict_modules_that_share_an_encoder(default):
    agent = default.agent
    assert type(agent) is f8.ActorCritic
    for operator in (agent.policy, agent.value, agent.joint):
        assert isinstance(operator, TensorDictModuleBase)
    shared = {id(p) for p in agent.policy.parameters()} & {id(p) for p in agent.value.parameters()}
    widths = [tuple(p.shape) for p in agent.parameters() if id(p) in shared]
    assert widths == [(64, 2), (64,), (64, 64), (64,)]


def test_the_default_data_path(default):
    assert type(default.collector) is Collector
    assert default.collector.env is default.env
    assert type(default.replay) is f8.data.PackedReplayBuffer
    assert isinstance(default.replay, TensorDictReplayBuffer)
    assert default.replay.storage.max_size == 10_000
    default.replay.extend(default.env.rollout(5, default.agent.policy).detach().reshape(-1))
    assert default.replay.sample().batch_size == (64,)
    default.replay.empty()


def test_the_default_step(default):
    step = default.step
    assert type(step) is f8.OptimStep
    assert isinstance(step, OptimizationStepper)
    assert isinstance(default.loss, LossModule)
    assert step.loss is default.loss
    assert step.precision.autocast_dtype == torch.bfloat16  # autocast is on
    (scaler,) = step.scalers.values()
    assert isinstance(scaler, torch.amp.GradScaler)
    assert not scaler.is_enabled()
    (optimizer,) = step.optimizers.values()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    (flat,) = (parameter for group in optimizer.param_groups for parameter in group["params"])
    assert type(flat) is f8.training.flat.FlatParameter
    assert {id(view) for view in flat.views} == {id(parameter) for parameter in default.agent.parameters()}


def test_the_scaler_of_an_fp16_run_is_live():
    pipeline = f8.recipes.build(f8.recipes.ActorCriticConfig(device="cpu", precision="fp16"))
    (scaler,) = pipeline.step.scalers.values()
    assert scaler.is_enabled()
    assert scaler.get_scale() == 2.0**16
    pipeline.collector.shutdown()


def test_the_default_configuration(default):
    config = default.config
    assert (config.episodes, config.gamma, config.lr, config.batch_size) == (2000, 0.99, 1e-3, 64)
    assert (config.replay_size, config.hidden, config.precision, config.report_every) == (10_000, (64, 64), "bf16", 100)
    assert config.algo == "actor-critic"
