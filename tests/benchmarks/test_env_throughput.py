"""The environment benchmark: that every way does the steps it is credited with, and what is recorded."""

import json

import env_throughput
import pytest
import torch
from dynamics import Dynamics

from fp8rl_torchrl.envs import make

CPU = torch.device("cpu")
SMALL = ("--device=cpu", "--no-compile", "--repeats=3", "--seconds=0.001", "--num-envs", "4", "6", "--out=r/env")


@pytest.mark.parametrize("task", env_throughput.TASKS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_dynamics_do_what_a_rollout_with_the_same_actions_does(task, blocks):
    env, twin = (make(task, num_envs=16, seed=3) for _ in range(2))
    torch.manual_seed(0)
    dynamics = Dynamics(env, 40, compiled=False, blocks=blocks)
    torch.manual_seed(7)
    dynamics()
    torch.manual_seed(7)
    live = twin.reset()
    for _ in range(blocks):
        for action in torch.randint(0, 2, (40, 16)):
            _, live = twin.step_and_maybe_reset(live.set("action", action))
    expected = twin.read(live)
    assert expected.episode.max() > 0, "episodes ended on the way"
    for mine, theirs in zip(dynamics.state, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    dynamics()  # and a further call goes on from there, with other actions
    assert not torch.equal(dynamics.state[0], expected[0])


@pytest.mark.parametrize("fixed", [True, False])
def test_actions_are_drawn_anew_for_each_call_unless_they_are_fixed(fixed):
    dynamics = Dynamics(make("CustomEnv", num_envs=64, seed=0), 1, compiled=False, fixed=fixed)
    start, ends = dynamics.state, []
    for _ in range(2):
        dynamics.state = start
        dynamics()
        ends.append(dynamics.state[1])
    assert torch.equal(*ends) is fixed


@pytest.mark.parametrize("task", env_throughput.TASKS)
def test_every_way_does_the_same_number_of_steps(task, monkeypatch):
    options, shapes = env_throughput.Options(block=5, compile=False, device="cpu"), {}
    stepped = []
    made = env_throughput.gymnasium.make_vec

    def watched(*args, **kwargs):
        env = made(*args, **kwargs)
        step = env.step
        monkeypatch.setattr(env, "step", lambda action: stepped.append(len(action)) or step(action))
        return env

    monkeypatch.setattr(env_throughput.gymnasium, "make_vec", watched)
    for way in env_throughput.WAYS:
        call = env_throughput.way_of(way, task, 4, CPU, options)
        result = call()
        if way in ("fused", "collector", "rollout"):
            shapes[way] = tuple(result.batch_size)
        elif way == "dynamics":
            state = make(task, num_envs=4).state_type(*call.state)
            assert state.step_count.tolist() == [5] * 4, "no episode is so short"
    assert shapes == dict.fromkeys(("fused", "collector", "rollout"), (4, 5))
    assert stepped == [4] * 5


def test_records_and_table(capsys):
    assert env_throughput.main(list(SMALL)) == 0
    with open("r/env.jsonl") as file:
        records = [json.loads(line) for line in file]
    names = [(task, way) for task in env_throughput.TASKS for way in env_throughput.WAYS]
    assert [(r["num_envs"], r["task"], r["way"]) for r in records] == [(n, *each) for n in (4, 6) for each in names]
    output = capsys.readouterr().out
    for record in records:
        assert record["failure"] is None
        assert {"versions", "hardware", "commit", "config"} <= set(record)
        assert record["median"] == sorted(record["steps_per_second"])[1]
        assert record["first_call_seconds"] is None, "nothing was compiled"
        base = next(
            r
            for r in records
            if (r["num_envs"], r["task"], r["way"]) == (record["num_envs"], record["task"], "collector")
        )
        pairs = zip(record["steps_per_second"], base["steps_per_second"], strict=True)
        assert [record["over_collector"][key] for key in ("min", "median", "max")] == pytest.approx(
            sorted(mine / theirs for mine, theirs in pairs)
        )
        assert f"{record['median'] / 1e6:.4g}" in output


def test_a_way_that_fails_is_recorded_and_fatal_in_the_end(monkeypatch, capsys):
    def failing(*_, **__):
        raise RuntimeError("no such environment")

    monkeypatch.setattr(env_throughput.gymnasium, "make_vec", failing)
    assert env_throughput.main([*SMALL, "--tasks", "CustomEnv"]) == 1
    assert "failed: RuntimeError: no such environment" in capsys.readouterr().err
    with open("r/env.jsonl") as file:
        failures = {json.loads(line)["way"]: json.loads(line)["failure"] for line in file}
    assert [way for way, failure in failures.items() if failure] == ["numpy"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-envs", "0"], "must be >= 1"),
        (["--ways", "dynamics", "teleport"], "unknown way teleport"),
        (["--tasks", "Pong"], "unknown task Pong"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
    ],
)
def test_refusals(argv, message, capsys, tmp_path):
    try:
        code = env_throughput.main([*argv, "--out=r/env"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    output = capsys.readouterr()
    assert message in " ".join((output.err + output.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiled_dynamics_equal_eager_ones():
    ends = []
    for compiled in (True, False):
        torch.manual_seed(0)
        dynamics = Dynamics(make("CustomEnv", num_envs=64, seed=0), 8, compiled, blocks=10)
        dynamics()
        ends.append(dynamics.state)
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
