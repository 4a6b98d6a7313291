"""What export refuses, before anything is written."""

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical

import fp8rl_torchrl as f8
from fp8rl_torchrl.training.export import collect_observations, export_policy
from fp8rl_torchrl.training.policy_file import ExportError

OBSERVATIONS = torch.zeros(3, 2)


def agent():
    return f8.ActorCritic(nn.Linear(2, 8), None, 8, Categorical(3))


def sum_dependent(observation):
    return observation if observation.sum() > 0 else -observation


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (
            agent(),
            TypeError,
            "a ActorCritic is none: pass an agent's .policy",
        ),
        (nn.Linear(2, 2), TypeError, "writes 'action'; a Linear is none"),
        (TensorDictModule(nn.Linear(2, 2), ["observation"], ["value"]), TypeError, "writes 'action'"),
        (
            TensorDictModule(torch.add, ["observation", "goal"], ["action"]),
            ExportError,
            r"reads \['observation', 'goal'\]",
        ),
        (TensorDictModule(nn.Linear(2, 2, device="meta"), ["observation"], ["action"]), ExportError, "is on meta; "),
        (
            TensorDictModule(sum_dependent, ["observation"], ["action"]),
            ExportError,
            "torch.export cannot trace this policy",
        ),
    ],
    ids=["agent", "module", "no action", "two entries", "device", "data-dependent"],
)
def test_what_cannot_be_exported_is_refused(tmp_path, policy, error, message):
    with pytest.raises(error, match=message) as refusal:
        export_policy(policy, OBSERVATIONS, tmp_path / "policy.pt2")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision_and_no_observations_are_refused(tmp_path):
    with pytest.raises(ExportError, match="exported in fp32 or bf16; got 'fp16'"):
        export_policy(agent().policy, OBSERVATIONS, tmp_path / "policy.pt2", precision="fp16")
    with pytest.raises(ExportError, match=r"at least one observation \[N, ...\]; got \[0, 2\]"):
        export_policy(agent().policy, OBSERVATIONS[:0], tmp_path / "policy.pt2")


def test_a_path_that_will_not_do_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"must end in \.pt2 \(torch\.export\) or \.onnx \(ONNX\); got .*policy\.pt$"):
        export_policy(agent().policy, OBSERVATIONS, tmp_path / "policy.pt")
    (tmp_path / "policy.pt2").write_text("an older file")
    with pytest.raises(ExportError, match=r"policy\.pt2 exists already"):
        export_policy(agent().policy, OBSERVATIONS, tmp_path / "policy.pt2")
    assert (tmp_path / "policy.pt2").read_text() == "an older file"


def test_observations_are_collected_for_a_policy_only():
    with pytest.raises(TypeError, match=r"a ActorCritic is none: pass an agent's \.policy"):
        collect_observations(agent(), f8.envs.CustomEnv(num_envs=2, seed=0))
