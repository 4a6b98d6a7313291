"""Files of exported policies, read again and compared with a policy that is written down here."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from fp8rl_torchrl.training.policy_file import ExportError, checked_format, compare_exported, read_exported

OBSERVATIONS = torch.tensor([[-2.0], [-1 / 64], [1.0]])


class Slope(nn.Module):
    """Two scores of one number x, weight · x and 0, and the action with the greater one."""

    def __init__(self, weight=1.0, scores=True, outputs=("action", "logits")):
        super().__init__()
        self.weight, self.scores, self.outputs = nn.Parameter(torch.tensor(weight)), scores, outputs

    def forward(self, observation):
        logits = torch.cat([self.weight * observation, torch.zeros_like(observation)], -1)
        each = {"action": logits.argmax(-1), "logits": logits}
        return {name: each[name] for name in self.outputs}


class Shift(nn.Module):
    """A continuous action, x + shift."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, observation):
        return {"action": observation + self.shift}


def saved(module, path):
    with torch.no_grad():
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(module, (torch.ones(2, 1),), dynamic_shapes=dynamic), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    modules = {
        "same": Slope(),
        "steeper": Slope(1.125),
        "negative": Slope(-0.25),
        "nan": Slope(math.nan),
        "actions": Slope(-0.25, outputs=("action",)),
        "shifted": Shift(0.5),
    }
    return {name: saved(module, folder / f"{name}.pt2") for name, module in modules.items()}


def test_a_file_of_the_same_policy_agrees(files):
    action, logits = compare_exported(files["same"], Slope(), OBSERVATIONS, tolerance=0.0)
    assert (action.name, action.same, action.difference, action.largest) == ("action", 1.0, None, 1.0)
    assert (logits.name, logits.same, logits.difference, logits.largest) == ("logits", None, 0.0, 2.0)


def test_differences_are_those_worked_out_by_hand(files):
    _, logits = compare_exported(files["steeper"], Slope(), OBSERVATIONS, tolerance=0.125)
    assert logits.difference == 0.25, "0.125 more of -2, whose size is the largest: just allowed"
    with pytest.raises(ExportError, match=r"logits differs by up to 0.25, and 0.24 is allowed \(0.12 of"):
        compare_exported(files["steeper"], Slope(), OBSERVATIONS, tolerance=0.12)
    (action,) = compare_exported(files["shifted"], Shift(), OBSERVATIONS, tolerance=0.25)
    assert (action.same, action.difference, action.largest) == (None, 0.5, 2.0)
    with pytest.raises(ExportError, match=r"action differs by up to 0\.5, and 0\.48 is allowed"):
        compare_exported(files["shifted"], Shift(), OBSERVATIONS, tolerance=0.24)


def test_another_action_is_allowed_only_where_the_policy_hardly_prefers_its_own(files):
    # The slopes 1 and -0.25 choose differently everywhere. The policy's own scores of -1/64 are 1/64 apart. Allowed is
    # twice 0.005 times the largest score: 1/6400 where it is 1/64, and 1/50 where it is 2.
    near = OBSERVATIONS[1:2]
    with pytest.raises(ExportError, match="another action in 1 of 1 observations"):
        compare_exported(files["negative"], Slope(), near, tolerance=0.005)
    with pytest.raises(ExportError, match="another action in 2 of 3 observations"):
        compare_exported(files["negative"], Slope(), OBSERVATIONS, tolerance=0.005)
    action, _ = compare_exported(files["negative"], Slope(), OBSERVATIONS, tolerance=1.25)
    assert action.same == 0.0, "with this tolerance all are nearly ties"


def test_without_scores_every_action_must_be_the_same(files):
    actions = Slope(outputs=("action",))
    with pytest.raises(ExportError, match="another action in 3 of 3 observations"):
        compare_exported(files["actions"], actions, OBSERVATIONS, tolerance=1.25)
    (action,) = compare_exported(files["actions"], Slope(-0.25, outputs=("action",)), OBSERVATIONS, tolerance=0.0)
    assert action.same == 1.0


def test_what_is_no_number_is_refused(files):
    with pytest.raises(ExportError, match="differs by up to nan"):
        compare_exported(files["nan"], Slope(), OBSERVATIONS[2:], tolerance=10.0)
    with pytest.raises(ExportError, match="differs by up to nan"):
        compare_exported(files["nan"], Slope(math.nan), OBSERVATIONS, tolerance=10.0)


def test_without_a_tolerance_nothing_is_refused(files):
    action, logits = compare_exported(files["negative"], Slope(), OBSERVATIONS, tolerance=None)
    assert (action.same, logits.difference) == (0.0, 2.5)


@pytest.mark.parametrize(
    ("name", "reference", "observations", "message"),
    [
        (
            "actions",
            Slope(),
            OBSERVATIONS,
            r"gives action int64 \[3\], the policy action int64 \[3\], logits float32 \[",
        ),
        ("shifted", Slope(outputs=("action",)), OBSERVATIONS, r"float32 \[3, 1\], the policy action int64 \[3\]"),
        ("same", Slope(), torch.ones(3, 5), "cannot be run on these observations: "),
    ],
)
def test_a_file_of_another_kind_of_policy_is_refused(files, name, reference, observations, message):
    with pytest.raises(ExportError, match=message) as refusal:
        compare_exported(files[name], reference, observations, tolerance=10.0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [1, 2, 1025, 1026])
def test_every_observation_is_compared(files, size):
    observations = torch.zeros(size, 1)
    observations[-1] = 3.0
    _, logits = compare_exported(files["steeper"], Slope(), observations, tolerance=None)
    assert (logits.difference, logits.largest) == (0.375, 3.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("policy.pt", r"ends in \.pt2 or \.onnx; got .*policy\.pt$"),
        ("nowhere.pt2", "nowhere.pt2 cannot be read as an exported policy: "),
        ("text.pt2", "text.pt2 cannot be read as an exported policy: "),
        ("text.onnx", "text.onnx cannot be read as an exported policy: "),
    ],
)
def test_what_is_no_exported_policy_is_refused(tmp_path, name, message):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    if name.startswith("text"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(ExportError, match=message) as refusal:
        read_exported(tmp_path / name)
    assert "\n" not in str(refusal.value)


# --- where a file may be written ---


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("policy.pt2", {"format": "onnx"}, r"must end in \.onnx; got .*policy\.pt2"),
        ("policy.onnx", {"format": "torch"}, r"must end in \.pt2; got .*policy\.onnx"),
        ("policy", {}, r"must end in \.pt2 \(torch\.export\) or \.onnx \(ONNX\); got .*policy"),
        ("policy.pt2", {"format": "tflite"}, "unknown format 'tflite'; use one of torch, onnx"),
        ("old.pt2", {}, r"old\.pt2 exists already; name another file, or ask for it to be overwritten \(--overwrite\)"),
        ("folder.pt2", {"overwrite": True}, r"folder\.pt2 is a folder; name a file"),
        ("nowhere/policy.pt2", {}, "nowhere does not exist"),
    ],
)
def test_a_path_that_will_not_do_is_refused(tmp_path, name, options, message):
    (tmp_path / "old.pt2").write_text("old")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExportError, match=message):
        checked_format(tmp_path / name, **options)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder.pt2", "old.pt2"]
    assert (tmp_path / "old.pt2").read_text() == "old"


def test_the_format_goes_by_the_ending(tmp_path):
    assert checked_format(tmp_path / "policy.pt2") == "torch"
    (tmp_path / "policy.pt2").write_text("old")
    assert checked_format(tmp_path / "policy.pt2", "torch", overwrite=True) == "torch"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_that_is_not_installed_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ImportError, match=rf"ONNX needs {missing}; run: pip install {missing}$"):
        checked_format(tmp_path / "policy.onnx")
    with pytest.raises(ImportError, match=rf"ONNX needs {missing}; run: pip install "):
        read_exported(tmp_path / "policy.onnx")
