"""The comparison's pure parts, and the two peers of this repository against each other and hand computations."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from peers_report import comparisons, plot, ratio, table

sys.path.append(str(Path(peers.__file__).parent / "peers"))
import plain_tasks
import torch_compiled
from protocol import CRITIC_COEFF, ENTROPY_COEFF, GAMMA, LAMBDA, Order, Trained, timed
from torch_compiled import Network, Rollout

from fp8rl_torchrl.envs import CustomEnv


def record(peer, repeat, rate=None, failure=None, precision="fp32", algo="a2c"):
    result = {"failure": failure} if failure else {"frames": 2 * rate, "updates": rate, "cpu_seconds": 2.0, "notes": []}
    where = {"task": "customenv", "algo": algo, "setting": "8x5", "peer": peer, "precision": precision}
    return {**where, "repeat": repeat, "result": result, "hardware": {"cpu": "a CPU"}}


def test_the_table_shows_ratios_of_each_turn_also_where_ours_is_slower():
    # The machine became ten times faster in the second turn: the ratio did not change.
    records = [
        record("ours", 0, 100), record("sb3", 0, 200), record("ours", 1, 1000), record("sb3", 1, 2000),
        record("ours", 2, 300), record("sb3", 2, 100),
    ]  # fmt: skip
    lines = table(records).splitlines()
    assert lines[1] == "customenv, a2c, 8x5"
    assert lines[2].split("  ")[-1].strip() == "ours fp32 / it"
    (sb3,) = [line for line in lines if line.strip().startswith("sb3")]
    assert sb3.split() == ["sb3", "fp32", "200", "(100–2,000)", "0.50", "(0.50–3.00)"]


def test_updates_are_counted_on_replay():
    assert "30 (30–30)" in table([record("torchrl", 0, 60, algo="replay")])
    assert "60 (60–60)" in table([record("torchrl", 0, 60)]), "frames: two an update here"


def test_a_peer_that_fails_is_listed_with_its_reason(tmp_path):
    records = [record("ours", 0, 10), record("skrl", 0, failure="not installed: No module named 'skrl'")]
    text = table(records)
    assert "skrl fp32: not installed: No module named 'skrl'" in text
    assert ["skrl", "fp32", "-", "-"] in [line.split() for line in text.splitlines()]
    plot(records, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 0


def test_ratios_need_a_common_turn():
    assert ratio({0: 3.0, 1: 8.0}, {1: 2.0}) == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert ratio({0: 3.0}, {1: 2.0}) is None
    assert set(comparisons([record("ours", 0, 1)])) == {("customenv", "a2c", "8x5")}


def test_every_peer_has_a_program_and_its_turn():
    folder = Path(peers.__file__).parent / "peers"
    assert all((folder / f"{program}.py").is_file() for program in peers.PROGRAMS.values())
    runs = peers.plan(peers.Options(tasks=("customenv",), algos=("a2c", "replay"), settings=("8x5",)))
    asked = [(run.algo, run.setting, run.peer, run.precision) for run in runs]
    assert asked == [
        *(("a2c", "8x5", "ours", precision) for precision in ("fp32", "bf16")),
        *(("a2c", "8x5", peer, "fp32") for peer in ("sb3", "skrl", "tianshou", "torchrl")),
        *(("a2c", "8x5", "compiled", precision) for precision in ("fp32", "bf16")),
        *(("replay", "128x8", "ours", precision) for precision in ("fp32", "bf16")),
        ("replay", "128x8", "torchrl", "fp32"),
    ]


def test_no_program_hides_a_library():
    assert not set(peers.PROGRAMS.values()) & {"skrl", "tianshou", "stable_baselines3", "torchrl", "torch"}


def test_command_lines(tmp_path):
    python = tmp_path / "python"
    python.touch()
    options = peers.Options(python=(f"skrl={python}",), frames=640, seed=3)
    words = peers.command(peers.Run("cartpole", "ppo", "64x32", "skrl", "fp32"), options, repeat=2)
    assert words[0] == str(python)
    assert Path(words[1]).name == "skrl_peer.py"
    assert {"--task=cartpole", "--algo=ppo", "--num-envs=64", "--steps=32", "--frames=640", "--seed=5"} <= set(words)
    assert peers.command(peers.Run("cartpole", "a2c", "8x5", "sb3", "fp32"), options, 0)[0] == sys.executable
    assert not [w for w in peers.command(peers.plan(options)[0], peers.Options(), 0) if w.startswith("--frames")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("pong",)}, "unknown task pong"),
        ({"peers": ("rllib",)}, "unknown peer rllib"),
        ({"settings": ("64",)}, "ENVSxSTEPS"),
        ({"settings": ("0x5",)}, "ENVSxSTEPS"),
        ({"python": ("skrl",)}, "PEER=PATH"),
        ({"python": ("skrl=/no/such/python",)}, "no such interpreter"),
        ({"repeats": 0}, "repeats"),
        ({"frames": 0}, "frames"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        peers.Options(**options)


def test_what_a_program_reports():
    assert peers.result_of(0, 'a warning\n{"frames": 1}\n', "") == {"frames": 1}
    assert peers.result_of(1, "", "Traceback\nValueError: no\n") == {"failure": "ended with code 1: ValueError: no"}
    assert peers.result_of(-9, "", "") == {"failure": "ended with code -9: without a word"}
    assert "code 1" in peers.result_of(1, "{broken", "")["failure"]


def test_a_program_runs_on_its_core_and_not_for_ever():
    core = peers.pinned_core(None)
    code = "import os, json; print(json.dumps({'cores': sorted(os.sched_getaffinity(0))}))"
    if core is not None:
        assert peers.take_turn([sys.executable, "-c", code], core, 60) == {"cores": [core]}
    slow = peers.take_turn([sys.executable, "-c", "import time; time.sleep(60)"], None, 0.2)
    assert slow == {"failure": "not done after 0.2 s"}
    assert "did not start" in peers.take_turn(["/no/such/python"], None, 1)["failure"]


def test_a_library_that_is_missing_is_a_reason(tmp_path):
    program = tmp_path / "absent.py"
    program.write_text(
        "import sys\nfrom protocol import main\n"
        "def build(order):\n    import a_library_that_is_not_there\n"
        "sys.exit(main(build, packages=()))\n"
    )
    code = f"import sys; sys.path.append({str(Path(peers.__file__).parent / 'peers')!r})\n"
    program.write_text(code + program.read_text())
    words = [sys.executable, str(program), "--task=cartpole", "--num-envs=2", "--steps=2"]
    reason = "not installed: No module named 'a_library_that_is_not_there'"
    assert peers.take_turn(words, None, 120) == {"failure": reason}
    assert peers.take_turn([*words, "--algo=replay"], None, 120) == {"failure": "does not offer replay in fp32"}


def order(**changes):
    base = {
        "task": "customenv", "num_envs": 2, "steps": 5, "frames": 30, "seconds": 1.0, "seed": 0, "algo": "a2c",
        "precision": "fp32", "activation": "tanh", "epochs": 1, "minibatches": 1,
    }  # fmt: skip
    return Order(**(base | changes))


def test_only_what_follows_the_warm_up_is_counted():
    asked = []

    def train(frames):
        asked.append(frames)
        return Trained(frames, 1)

    result = timed(train, order())
    assert asked == [10, 10, 10, 30], "three rollouts before, then what was ordered"
    assert (result["frames"], result["updates"], result["imports_excluded"]) == (30, 1, True)


def test_without_frames_a_turn_lasts_as_long_as_asked():
    assert timed(lambda frames: Trained(frames, 1), order(frames=None, seconds=0.05))["seconds"] >= 0.05


def test_the_dynamics_of_customenv_are_the_environments():
    torch.manual_seed(0)
    env = CustomEnv(num_envs=512, seed=0)
    zeros = torch.zeros(512, dtype=torch.int64)
    state = env.pure_reset(zeros, torch.arange(512), zeros)
    state = state._replace(position=torch.rand(512) * 5.2 - 2.6, velocity=torch.rand(512) * 6 - 3)
    action = torch.randint(2, (512,))
    after, observation, reward, terminated, _ = env.pure_step(state, action)
    mine = plain_tasks.custom_step(torch.stack((state.position, state.velocity), -1), action.float())
    bound = 4 * torch.finfo(torch.float32).eps
    assert (mine[0] - observation).abs().max() <= bound * 4
    assert (mine[1] - reward).abs().max() <= bound * 2
    clear = (after.position.abs() - 2.4).abs() > bound * 4
    assert (mine[2] == terminated)[clear].all()
    assert terminated.any()
    assert not terminated.all()
    pushed = plain_tasks.custom_step(torch.stack((state.position, state.velocity), -1), 1 - action.float())
    assert (pushed[0] - observation).abs().max() > 0.01, "the other action gives another state"


def test_the_dynamics_of_cartpole_are_gymnasiums():
    import gymnasium

    env = gymnasium.make("CartPole-v1").unwrapped
    for seed in range(20):
        env.reset(seed=seed)
        for step in range(8):
            state, action = torch.tensor(np.array(env.state)), (seed + step) % 2
            _, reward, terminated, _, _ = env.step(action)
            mine = plain_tasks.cartpole_step(state.double()[None], torch.tensor([float(action)], dtype=torch.float64))
            np.testing.assert_allclose(mine[0][0].numpy(), np.array(env.state), rtol=1e-12, atol=1e-12)
            assert (float(mine[1]), bool(mine[2])) == (reward, terminated)


def tiny_rollout(task):
    torch.manual_seed(1)
    network = Network(2).double()
    state, count = task.start(torch.rand(3, 2).double()), torch.tensor([0, 197, 40])
    state[2, 0] = 2.39  # leaves soon, to the right
    state[2, 1] = 1.5
    draws, starts = torch.rand(4, 3).double(), torch.rand(4, 3, 2).double()
    with torch.no_grad():
        return network, *torch_compiled.collect(network, task, state, count, draws, starts)


def test_a_rollout_ends_episodes_and_starts_others():
    _, rollout, count = tiny_rollout(plain_tasks.TASKS["customenv"])
    assert rollout.truncated.nonzero().tolist() == [[2, 1]], "the 200th step of the second"
    assert rollout.terminated.nonzero().tolist() == [[0, 2]]
    assert count.tolist() == [4, 1, 3]
    going_on = ~(rollout.truncated | rollout.terminated)[:-1]
    torch.testing.assert_close(rollout.observation[1:][going_on], rollout.next_observation[:-1][going_on])
    assert (rollout.observation[1:][~going_on].abs() <= torch.tensor([0.5, 0.05])).all(), "start states"


def by_hand(network, rollout):
    """The A2C loss, from loops over numbers in float64."""
    weight, bias = network.heads.weight, network.heads.bias

    def value(observation):
        return network.encoder(observation) @ weight[1] + bias[1]

    times, envs = rollout.reward.shape
    advantage = torch.zeros(times, envs, dtype=torch.float64)
    for env in range(envs):
        carried = 0.0
        for time in reversed(range(times)):
            ended = bool(rollout.terminated[time, env] or rollout.truncated[time, env])
            # Truncated: bootstrapped from the true next observation. Terminated: no future.
            future = 0.0 if rollout.terminated[time, env] else value(rollout.next_observation[time, env]).item()
            delta = float(rollout.reward[time, env]) + GAMMA * future - value(rollout.observation[time, env]).item()
            carried = delta + (0.0 if ended else GAMMA * LAMBDA * carried)
            advantage[time, env] = carried
    target = advantage + value(rollout.observation).detach()
    loss = 0.0
    for time in range(times):
        for env in range(envs):
            observation = rollout.observation[time, env]
            right = (network.encoder(observation) @ weight[0] + bias[0]).sigmoid()
            taken = right if rollout.action[time, env] else 1 - right
            entropy = -(right * right.log() + (1 - right) * (1 - right).log())
            error = (target[time, env] - value(observation)) ** 2
            loss += -taken.log() * advantage[time, env] + CRITIC_COEFF * error - ENTROPY_COEFF * entropy
    return loss / (times * envs)


def gradients(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def test_the_a2c_loss_and_its_gradient_are_those_computed_by_hand():
    network, rollout, _ = tiny_rollout(plain_tasks.TASKS["customenv"])
    with torch.no_grad():
        reward = torch_compiled.bootstrapped(network, rollout)
    loss, expected = torch_compiled.a2c_loss(network, rollout, reward), by_hand(network, rollout)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads, wanted = gradients(loss, network), gradients(expected, network)
    torch.testing.assert_close(grads, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    values = {name: parameter.detach() for name, parameter in network.named_parameters()}
    used = torch_compiled.gradients(torch_compiled.a2c_loss, network, values, rollout, reward)
    torch.testing.assert_close(torch.cat([g.flatten() for g in used.values()]), grads, rtol=1e-12, atol=1e-14)
    # Without the bootstrap of the truncated step it is another loss.
    assert abs(float(torch_compiled.a2c_loss(network, rollout, rollout.reward) - expected)) > 1e-6


def test_ppo_starts_at_the_policy_gradient():
    # At the collecting policy the ratio is 1, so the gradient is A2C's with normalised advantages.
    network, rollout, _ = tiny_rollout(plain_tasks.TASKS["customenv"])
    with torch.no_grad():
        old, advantage, target = torch_compiled.ppo_targets(network, rollout, rollout.reward)
    flat = [column.flatten(0, 1) for column in (rollout.observation, rollout.action, old, advantage, target)]
    loss = torch_compiled.ppo_loss(network, *flat)
    normal = (flat[3] - flat[3].mean()) / (flat[3].std() + 1e-8)
    log_odds, value = network(flat[0])
    log_prob = torch.distributions.Bernoulli(logits=log_odds).log_prob(flat[1])
    critic = (flat[4] - value).square().mean()
    entropy = torch.distributions.Bernoulli(logits=log_odds).entropy().mean()
    expected = -(normal * log_prob).mean() + CRITIC_COEFF * critic - ENTROPY_COEFF * entropy
    torch.testing.assert_close(gradients(loss, network), gradients(expected, network), rtol=1e-9, atol=1e-13)


def test_both_peers_of_this_repository_estimate_the_same_advantages():
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.objectives.value import GAE

    network, rollout, _ = tiny_rollout(plain_tasks.TASKS["customenv"])

    def value(observation):
        return network(observation)[1].unsqueeze(-1)

    columns = {name: getattr(rollout, name).transpose(0, 1) for name in Rollout._fields[:-1]}
    done = columns["terminated"] | columns["truncated"]
    following = {"observation": columns["next_observation"]} | {
        name: column.unsqueeze(-1)
        for name, column in (("reward", columns["reward"]), ("terminated", columns["terminated"]), ("done", done))
    }
    data = TensorDict({"observation": columns["observation"], "next": following}, batch_size=(3, 4))
    estimator = GAE(
        gamma=GAMMA, lmbda=LAMBDA, value_network=TensorDictModule(value, ["observation"], ["state_value"])
    )  # fmt: skip
    with torch.no_grad():
        theirs = estimator(data)["advantage"].squeeze(-1)
        reward = torch_compiled.bootstrapped(network, rollout)
        mine = torch_compiled.ppo_targets(network, rollout, reward)[1]
    torch.testing.assert_close(mine, theirs.transpose(0, 1), rtol=0, atol=1e-5)


def test_bad_input_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as refused:
        peers.main(["--tasks", "pong"])
    assert refused.value.code == 2
    assert "unknown task pong" in capsys.readouterr().err
    if hasattr(os, "sched_setaffinity"):
        assert peers.main(["--core", "100000"]) == 2
        assert "core 100000 cannot be used here" in capsys.readouterr().err


def test_a_run_records_every_turn(monkeypatch, tmp_path, capsys):
    turns = []

    def turn(words, core, limit):
        turns.append(Path(words[1]).stem)
        if words[1].endswith("skrl_peer.py"):
            return {"failure": "not installed: No module named 'skrl'"}
        return {"frames": 100, "updates": 1, "cpu_seconds": 1.0}

    monkeypatch.setattr(peers, "take_turn", turn)
    arguments = "--tasks customenv --settings 8x5 --peers ours skrl sb3 --precisions fp32 --repeats 2 --out out/peers"
    assert peers.main(arguments.split()) == 0
    assert turns == ["ours", "skrl_peer", "sb3", "ours", "sb3"], "interleaved; what failed is not tried again"
    records = [json.loads(line) for line in (tmp_path / "out/peers.jsonl").read_text().splitlines()]
    assert len(records) == 5
    assert all(r["hardware"]["cpu"] and r["versions"]["torch"] and "commit" in r for r in records)
    assert (tmp_path / "out/peers.png").exists()
    assert "skrl fp32: not installed" in capsys.readouterr().out
