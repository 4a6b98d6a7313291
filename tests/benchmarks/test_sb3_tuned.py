"""Stable-Baselines3 with tuned settings: read as they are meant, and not changed by being looked at."""

import json

import judged_run
import numpy as np
import pytest
import sb3_tuned
import torch
from judged_run import Exam
from tensordict import TensorDict

TASK = "CartPole-v1"
TINY = {"n_envs": 2, "n_timesteps": 64, "n_steps": 16, "batch_size": 16, "n_epochs": 2, "learning_rate": "lin_0.01"}


def test_theirs_stops_at_the_threshold_and_its_time_is_without_evaluations(monkeypatch):
    now = [0.0]

    def look(self, frames, seconds):
        now[0] += 100.0  # an evaluation takes long
        self.evaluations.append((frames, 0.0, seconds))
        self.passed = frames >= 20
        return self.passed

    monkeypatch.setattr(sb3_tuned.time, "process_time", lambda: now[0])
    monkeypatch.setattr(judged_run.Examiner, "look", look)
    result = sb3_tuned.train("ppo", TASK, TINY, 1, Exam(every=2, threshold=1.0))
    assert (result["stopped_by"], result["passed"], result["frames"]) == ("threshold", True, 20)
    assert [frames for frames, *_ in result["evaluations"]] == list(range(2, 21, 2)), "asked after each step of both"
    assert result["seconds"] == 0.0


@pytest.mark.parametrize(
    ("recipe", "task", "settings"),
    [
        ("ppo", TASK, TINY | {"normalize": True}),
        ("sac", "Pendulum-v1", {"n_timesteps": 120, "batch_size": 8}),
    ],
)
def test_looking_at_theirs_does_not_change_it(recipe, task, settings):
    """Neither its parameters nor the statistics that it normalises by."""

    def trained(exam):
        agents = []
        with pytest.MonkeyPatch.context() as patch:
            build = sb3_tuned.build
            patch.setattr(sb3_tuned, "build", lambda *given: agents.append(build(*given)) or agents[-1])
            result = sb3_tuned.train(recipe, task, settings, 1, exam)
        normalizer = agents[0].get_vec_normalize_env()
        statistics = None if normalizer is None else normalizer.obs_rms.mean.tolist()
        return result, [p.tolist() for p in agents[0].policy.parameters()], statistics

    looked, parameters, statistics = trained(Exam(every=20, episodes=2))
    never, same, same_statistics = trained(Exam())
    assert len(looked["evaluations"]) >= 3
    assert never["evaluations"] == []
    assert parameters == same
    assert statistics == same_statistics


def test_its_policy_is_deterministic_and_normalises_as_it_was_trained():
    agent = sb3_tuned.build("ppo", TASK, TINY | {"normalize": True}, 1)
    agent.learn(64)
    observation = torch.tensor(np.random.default_rng(0).normal(size=(5, 4)), dtype=torch.float32)
    policy = sb3_tuned.policy_of(agent)
    first, second = (policy(TensorDict({"observation": observation}, [5]))["action"] for _ in range(2))
    normalizer = agent.get_vec_normalize_env()
    normal = (observation.numpy() - normalizer.obs_rms.mean) / np.sqrt(normalizer.obs_rms.var + normalizer.epsilon)
    expected, _ = agent.predict(np.clip(normal, -10, 10).astype(np.float32), deterministic=True)
    assert first.tolist() == second.tolist() == expected.tolist()
    assert normalizer.obs_rms.mean.any(), "it has learned something to normalise by"


def test_settings_are_read_as_they_are_meant():
    agent = sb3_tuned.build("ppo", TASK, TINY | {"clip_range": "lin_0.2"}, 1)
    assert agent.n_envs == 2
    assert [agent.lr_schedule(left) for left in (1.0, 0.5, 0.0)] == [0.01, 0.005, 0.0]
    assert agent.clip_range(0.5) == pytest.approx(0.1)
    settings = {"n_timesteps": 1, "noise_type": "normal", "noise_std": 0.1, "policy_kwargs": {"net_arch": [4, 3]}}
    td3 = sb3_tuned.build("td3", "Pendulum-v1", settings, 1)
    assert td3.action_noise._sigma.tolist() == [0.1]
    assert [layer.out_features for layer in td3.actor.mu if hasattr(layer, "out_features")] == [4, 3, 1]


def test_a_process_of_its_own_prints_what_became_of_it(capsys):
    job = {"recipe": "ppo", "task": TASK, "settings": TINY, "seed": 1, "exam": {"every": 32, "episodes": 2}}
    assert sb3_tuned.main([json.dumps(job)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["failure"], result["frames"], result["stopped_by"]) == (None, 64, "budget")
    assert [frames for frames, *_ in result["evaluations"]] == [32, 64]
    assert sb3_tuned.main([json.dumps(job | {"settings": TINY | {"colour": "red"}})]) == 0
    assert "colour" in json.loads(capsys.readouterr().out.splitlines()[-1])["failure"]
