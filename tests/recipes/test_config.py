"""What every recipe's configuration refuses, saves and stands for."""

import ast
import dataclasses
import datetime
import inspect
import json
from typing import ClassVar

import pytest
import torch

from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.recipes import RECIPES, ActorCriticConfig, DQNConfig, PPOConfig, RecipeConfig, config, config_class

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes must be >= 1; got 0"),
        ({"total_frames": 0}, "total_frames must be >= 1; got 0"),
        ({"updates_per_collection": 0}, "updates_per_collection must be >= 1"),
        ({"min_replay": 0}, "min_replay must be >= 1"),
        ({"eval_every": -1}, "eval_every must be >= 0"),
        ({"eval_episodes": 0}, "eval_episodes must be >= 1"),
        ({"final_eval_episodes": 0}, "final_eval_episodes must be >= 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1"),
        ({"precision": "banana"}, "unknown precision 'banana'; use one of fp32, tf32, bf16, fp16"),
        ({"rollout_precision": "banana"}, "unknown precision 'banana'"),
        ({"init_scale": 0.0}, "init_scale must be > 0"),
        ({"growth_interval": 0}, "growth_interval must be >= 1"),
        ({"num_threads": 0}, "num_threads must be >= 1"),
        ({"num_envs": 0}, "num_envs must be >= 1"),
        ({"frames_per_collection": 0}, "frames_per_collection must be >= 1"),
        ({"report_every": 0}, "report_every must be >= 1"),
        ({"frames_per_collection": 100, "num_envs": 64}, "must be a multiple of num_envs; got 100 and 64"),
        ({"hidden": ()}, r"hidden must name at least one layer, each at least 1 wide; got \(\)"),
        ({"hidden": (64, 0)}, "hidden must name at least one layer"),
        ({"lr": 0.0}, "lr must be > 0; got 0.0"),
        ({"lr": NAN}, "lr must be > 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be > 0"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\]; got 1.5"),
        ({"gamma": NAN}, r"gamma must lie in \[0, 1\]"),
        ({"reward_scale": 0.0}, "reward_scale must be > 0; got 0.0"),
        ({"reward_scale": -1.0}, "reward_scale must be > 0"),
        ({"reward_scale": float("inf")}, "reward_scale must be > 0; got inf"),
        ({"reward_clip": 0.0}, "reward_clip must be > 0; got 0.0"),
        ({"reward_clip": NAN}, "reward_clip must be > 0"),
        ({"lr_final": 1.5}, r"lr_final must lie in \[0, 1\]; got 1.5"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be >= 1; got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\^32\); got -1"),
        ({"seed": 2**32}, r"seed must lie in \[0, 2\^32\)"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecipeConfig(**options)


@pytest.mark.parametrize(
    ("recipe", "name", "known"),
    [
        (RecipeConfig, "collector", "auto, torchrl, fused"),
        (RecipeConfig, "compile", "auto, on, off"),
        (RecipeConfig, "cudagraph", "auto, on, off"),
        (RecipeConfig, "activation", "tanh, relu"),
        (RecipeConfig, "lr_schedule", "constant, linear, cosine"),
        (PPOConfig, "algo", "ppo"),
        (DQNConfig, "target_update", "soft, hard, episodes"),
        (DQNConfig, "epsilon_schedule", "linear, exponential"),
        (DQNConfig, "loss", "l2, smooth_l1"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(recipe, name, known):
    with pytest.raises(ValueError, match=f"^{name} takes one of {known}; got 'banana'$"):
        recipe(**{name: "banana"})
    for value in known.split(", "):
        recipe(**{name: value, "env": "CustomEnv"})


def test_the_limits_themselves_can_be_run():
    RecipeConfig(episodes=1, total_frames=1, eval_every=0, gamma=0.0, seed=2**32 - 1, hidden=(1,), num_envs=1)
    RecipeConfig(gamma=1.0, frames_per_collection=64, num_envs=64)


def test_the_documented_defaults():
    defaults = RecipeConfig()
    assert (defaults.env, defaults.precision, defaults.hidden) == ("CustomEnv", "bf16", (64, 64))
    assert (defaults.initial_lr(), defaults.lr_schedule, defaults.lr_final) == (1e-3, "linear", 0.05)
    assert (defaults.gamma, defaults.episodes, defaults.report_every) == (0.99, 2000, 100)
    assert (defaults.reward_scale, defaults.reward_clip) == (1.0, None)
    assert (defaults.normalize_observation, defaults.deterministic) == (False, False)


def test_a_configuration_cannot_be_changed_and_takes_no_positions():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RecipeConfig().seed = 1
    with pytest.raises(TypeError):
        RecipeConfig("CustomEnv")


def test_every_field_is_documented_beneath_it():
    for cls in {base for recipe, _ in RECIPES.values() for base in recipe.__mro__[:-1]}:
        (body,) = ast.parse(inspect.getsource(cls)).body
        for field, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{cls.__name__}.{field.target.id}"


@pytest.mark.parametrize("recipe", [cls for cls, _ in RECIPES.values()])
def test_options_survive_a_round_trip_through_json(recipe):
    written = recipe(env="CartPole-v1", precision="fp16", hidden=(32, 16, 8), total_frames=1024, seed=7, lr=3e-4)
    read = recipe.from_dict(json.loads(json.dumps(written.to_dict())))
    assert read == written
    assert read.hidden == (32, 16, 8)
    assert read != recipe()
    assert recipe.from_dict(recipe().to_dict()) == recipe()


def test_unknown_and_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown options colour, size; this version knows .*checkpoint_every"):
        RecipeConfig.from_dict({"size": 3, "seed": 0, "colour": "red"})
    with pytest.raises(ValueError, match=r"^num_envs takes an integer; got 'many'$"):
        RecipeConfig.from_dict({"num_envs": "many"})
    with pytest.raises(ValueError, match="lr must be > 0"):
        RecipeConfig.from_dict({"lr": -1.0})


# ---------------------------------------------------------------------------------------------- presets and variants


class Tuned(RecipeConfig):
    PRESETS: ClassVar = {"CartPole-v1": {"lr": 0.5, "hidden": (3,)}}
    VARIANTS: ClassVar = {"wide": {"hidden": (999,), "gamma": 0.5}}


def test_a_preset_is_for_its_task_and_options_win_over_it():
    assert Tuned.for_task("CartPole-v1") == Tuned(env="CartPole-v1", lr=0.5, hidden=(3,))
    assert Tuned.for_task("CartPole-v1", lr=0.25) == Tuned(env="CartPole-v1", lr=0.25, hidden=(3,))
    assert Tuned.for_task("CustomEnv", seed=3) == Tuned(env="CustomEnv", seed=3)


def test_a_variant_is_for_any_task_and_options_win_over_it():
    assert Tuned.variant("wide", "CartPole-v1") == Tuned(env="CartPole-v1", hidden=(999,), gamma=0.5)
    assert Tuned.variant("wide", "CustomEnv", gamma=1.0) == Tuned(env="CustomEnv", hidden=(999,), gamma=1.0)


def test_an_unknown_variant_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"there is no variant 'banana' of .*; there are: wide"):
        Tuned.variant("banana", "CustomEnv")
    with pytest.raises(ValueError, match="there are: none"):
        PPOConfig.variant("banana", "CustomEnv")


# --------------------------------------------------------------------------------------------------------- resolving


@pytest.mark.parametrize(("there_is_one", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(there_is_one, device, monkeypatch):
    made = []
    monkeypatch.setattr(config.torch.cuda, "is_available", lambda: there_is_one)
    monkeypatch.setattr(config.torch, "empty", lambda *shape, device: made.append(device))
    resolved = RecipeConfig(seed=3).resolved()
    decided = {"collector": "torchrl", "compile": "off", "cudagraph": "off"}
    # 2000 episodes of 100 steps make 196 collections of 1024 frames, with 24 updates each
    decided |= {"lr": 1e-3, "lr_decay_updates": 196 * 24, "rollout_precision": "fp32"}
    assert resolved == RecipeConfig(seed=3, device=device, **decided)
    assert made == [device], "a device is tried out before anything is built"


@pytest.mark.parametrize(
    ("hidden", "lr", "resolved"),
    [((64, 64), None, 1e-3), ((64, 65), None, 1e-4), ((256, 256, 256), None, 1e-4), ((256,), 0.01, 0.01)],
)
def test_wide_networks_learn_with_smaller_steps(hidden, lr, resolved):
    assert RecipeConfig(hidden=hidden, lr=lr, device="cpu").resolved().lr == resolved


def test_the_learning_rate_falls_over_the_whole_run_unless_it_is_said():
    short = {"num_envs": 2, "frames_per_collection": 10, "device": "cpu", "updates_per_collection": 3}
    assert RecipeConfig(total_frames=101, **short).resolved().lr_decay_updates == 11 * 3  # the last one is whole, too
    assert RecipeConfig(total_frames=None, episodes=2, **short).resolved().lr_decay_updates == 20 * 3  # 200 steps
    assert RecipeConfig(total_frames=101, lr_decay_updates=5, **short).resolved().lr_decay_updates == 5
    assert ActorCriticConfig(device="cpu").resolved().lr_decay_updates == 7000, "that of the default run is fixed"


def test_a_named_device_is_kept():
    assert RecipeConfig(device="cpu").resolved().device == "cpu"


@pytest.mark.parametrize("device", ["banana", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here: ."):
        RecipeConfig(device=device).resolved()


def test_the_run_folder_is_named_by_what_runs(monkeypatch):
    class Now(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(config.datetime, "datetime", Now)
    here = config_class("actor-critic")(precision="fp16", seed=7)
    assert here.default_run_dir() == "runs/actor-critic-CustomEnv-fp16-s7-20260102-030405"
    other = dataclasses.replace(here, env="fp8rl/CustomEnv-v0")
    assert other.default_run_dir() == "runs/actor-critic-fp8rl-CustomEnv-v0-fp16-s7-20260102-030405"


def test_the_precision_has_the_configured_loss_scaling():
    precision = RecipeConfig(precision="fp16", init_scale=8.0, growth_interval=3).make_precision()
    assert (precision.name, precision.init_scale, precision.growth_interval) == ("fp16", 8.0, 3)


def test_the_environment_is_the_one_named():
    env = RecipeConfig(num_envs=3, frames_per_collection=9, device="cpu", seed=5).make_env()
    assert isinstance(env, CustomEnv)
    assert env.batch_size == (3,)
    assert torch.equal(env.reset()["observation"], CustomEnv(num_envs=3, seed=5).reset()["observation"])
    with pytest.raises(ValueError, match="NoSuchEnv-v0"):
        RecipeConfig(env="NoSuchEnv-v0", device="cpu").make_env()
