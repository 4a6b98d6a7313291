"""`train.py --algo`: each recipe with its preset, and what was chosen, and why, in the output."""

import json
import re
from pathlib import Path

import pytest
from programs import call, evaluate, refused, train

from fp8rl_torchrl.recipes import A2CConfig, DQNConfig, PPOConfig
from fp8rl_torchrl.training.metrics import read_metrics
from fp8rl_torchrl.training.run_folder import RunFolder

SMALL = (
    *("--num-envs=4", "--frames-per-collection=64", "--hidden=16", "--device=cpu"),
    *("--eval-episodes=2", "--final-eval-episodes=3", "--eval-every=200"),
)
PPO = (*SMALL, "--batch-size=16")


def run(algo, *argv, frames=256):
    return call(train, f"--algo={algo}", *(PPO if algo == "ppo" else SMALL), f"--total-frames={frames}", *argv)


def config_of(folder):
    return RunFolder(folder).read_config()


@pytest.mark.parametrize("env", ["CustomEnv", "CartPole-v1", "gymnasium:Acrobot-v1", "Pendulum-v1"])
@pytest.mark.parametrize("algo", ["a2c", "ppo"])
def test_a_run_leaves_what_a_run_leaves(algo, env, capsys):
    options = () if env in ("CustomEnv", "CartPole-v1") else ("--collector=torchrl",)
    assert run(algo, f"--env={env}", "--run-dir=run", *options) == 0
    output = capsys.readouterr().out
    assert f"{env}, " in output
    rows = read_metrics("run/metrics.csv")
    assert len(rows) == 4
    assert {"loss_actor", "loss_critic", "grad_norm"} <= set(rows[0])
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["frames"] == 256
    config = config_of("run")
    assert (config["algo"], config["env"]) == (algo, env)
    assert "auto" not in (config["collector"], config["compile"], config["cudagraph"])
    assert call(evaluate, "run", "--episodes=2", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["returns"]) == 2


# ------------------------------------------------------------------------------------------------ what was chosen


def test_what_was_chosen_is_printed_before_training(capsys):
    assert run("a2c", "--run-dir=run") == 0
    output = capsys.readouterr().out
    compile, collector = (
        "compile off: uncompiled, it takes 0 s or more, and compiling alone about 45 s",
        "collector torchrl: ",
    )
    assert compile in output
    assert f"{collector}the run is not compiled" in output
    assert output.index(compile) < output.index(collector) < output.index("evaluation return")
    config = config_of("run")
    assert (config["compile"], config["collector"], config["cudagraph"]) == ("off", "torchrl", "off")


def test_what_was_given_needs_no_reason(capsys):
    assert run("a2c", "--run-dir=run", "--collector=fused", "--compile=off") == 0
    output = capsys.readouterr().out
    assert "compile off:" not in output
    assert "collector fused:" not in output
    assert (config_of("run")["compile"], config_of("run")["collector"]) == ("off", "fused")


def test_the_default_recipe_says_what_it_chose_too(capsys):
    assert call(train, *PPO, "--min-replay=64", "--total-frames=64", "--run-dir=run") == 0
    assert "collector torchrl: the run is not compiled" in capsys.readouterr().out


def test_a_resumed_run_keeps_what_was_chosen(capsys):
    assert run("ppo", "--run-dir=run", "--collector=fused", "--compile=off", "--precision=fp32") == 0
    assert call(train, "--resume=run", "--total-frames=512") == 0
    output = capsys.readouterr().out
    assert "and compiling alone" not in output, "nothing was left to choose"
    assert run("ppo", "--run-dir=whole", "--collector=fused", "--compile=off", "--precision=fp32", frames=256) == 0
    assert len(read_metrics("run/metrics.csv")) == 8
    first = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics("run/metrics.csv")[:4]]
    assert repr(first) == repr(
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics("whole/metrics.csv")]
    )


# --------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("words", [["--env=CartPole-v1"], ["--env", "CartPole-v1"]])
def test_ppo_starts_from_the_preset_of_the_task(words):
    config, _ = train.parse(["--algo=ppo", *words])
    assert config == PPOConfig.for_task("CartPole-v1")
    assert config != PPOConfig(env="CartPole-v1")
    config, _ = train.parse(["--algo=ppo", *words, "--lr=0.5", "--collector=torchrl"])
    assert config == PPOConfig.for_task("CartPole-v1", lr=0.5, collector="torchrl")


@pytest.mark.parametrize(
    ("algo", "variant", "expected"),
    [
        ("dqn", "guide", {"epsilon_decay": 0.995, "target_update": "episodes", "episodes": 500}),
        ("actor-critic", "online", {"hidden": (128,), "shared": False, "replay_size": 0}),
        ("td3", "ddpg", {"critics": 1, "actor_every": 1, "target_noise": 0.0}),
    ],
)
def test_a_variant_takes_the_place_of_the_preset(algo, variant, expected):
    config, _ = train.parse([f"--algo={algo}", f"--variant={variant}", "--env=CartPole-v1", "--seed=3"])
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.env, config.seed) == ("CartPole-v1", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algo=dqn", "--variant=gide"], "there is no variant 'gide' of DQNConfig; there are: guide"),
        (["--algo=ppo", "--variant=guide"], "there is no variant 'guide' of PPOConfig; there are: none"),
        (["--variant=online", "--resume=runs/x"], "--variant does not go with --resume or --config"),
    ],
)
def test_variants_that_there_are_not_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        train.parse(words)


def test_where_there_is_no_preset_the_defaults_hold():
    assert train.parse(["--algo=ppo"])[0] == PPOConfig()
    assert train.parse(["--algo=ppo", "--env=MountainCar-v0"])[0] == PPOConfig(env="MountainCar-v0")
    assert train.parse(["--algo=a2c", "--env=Pendulum-v1"])[0] == A2CConfig(env="Pendulum-v1")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--algo=a2c", "--updates-per-collection=2"], "are not options of this recipe"),
        (["--algo=ppo", "--batch-size=500"], "batch_size must divide frames_per_collection"),
        (["--algo=ppo", "--env=gymnasium:Acrobot-v1", "--collector=fused"], "Acrobot-v1 has none: use torchrl"),
        (["--algo=a2c", "--device=cpu", "--cudagraph=on"], "cudagraph='on' needs a GPU"),
        (["--algo=a3c"], "unknown algo 'a3c'; use one of actor-critic, reinforce, a2c, ppo, dqn, sac, td3"),
        (["--algo=a2c", "--collector=banana"], "auto"),
        (["--algo=a2c", "--compile=yes"], "auto"),
        (["--algo=ppo", "--env"], "env"),
    ],
)
def test_bad_input_is_refused(argv, message, capsys):
    assert message in refused(capsys, train, *argv)


@pytest.mark.parametrize("algo", ["a2c", "ppo"])
def test_every_option_of_the_recipe_is_an_option_of_the_script(algo, capsys):
    assert call(train, f"--algo={algo}", "--help") == 0
    text = capsys.readouterr().out
    config, _ = train.parse([f"--algo={algo}"])
    for name in config.to_dict():
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text), name
    for name, values in (("collector", "auto,torchrl,fused"), ("compile", "auto,on,off"), ("cudagraph", "auto,on,off")):
        assert f"--{name} {{{values}}}" in text


def test_episodes_take_the_place_of_the_presets_frames():
    assert DQNConfig.for_task("CartPole-v1").total_frames is not None
    config, _ = train.parse(["--algo=dqn", "--env=CartPole-v1", "--episodes=30"])
    assert (config.total_frames, config.episodes) == (None, 30)
    config, _ = train.parse(["--algo=dqn", "--env=CartPole-v1", "--episodes=30", "--total-frames=512"])
    assert config.total_frames == 512


def test_a_run_that_learned_nothing_and_was_never_looked_at_says_so(capsys):
    options = ("--num-envs=4", "--frames-per-collection=64", "--device=cpu", "--final-eval-episodes=3")
    assert call(train, "--algo=dqn", "--env=CartPole-v1", *options, "--total-frames=128", "--run-dir=none") == 0
    output = capsys.readouterr().out
    assert "nothing was learned: of 128 frames no update was made (min_replay is 1,000)" in output
    assert "the target return was never looked at" in output
    assert call(train, "--algo=dqn", "--env=CartPole-v1", *options, "--total-frames=128", "--min-replay=64",
                "--batch-size=16", "--eval-every=64", "--eval-episodes=2", "--run-dir=some") == 0  # fmt: skip
    output = capsys.readouterr().out
    assert "nothing was learned" not in output
    assert "never looked at" not in output
