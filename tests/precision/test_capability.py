"""What a device runs in FP8: told honestly, chosen visibly, refused clearly; machines of other kinds are simulated."""

import dataclasses
import runpy
import subprocess
import sys

import pytest
import torch
from products import operands

from fp8rl_torchrl.precision import capability
from fp8rl_torchrl.precision.capability import capability_table, choose_backend, float8_capability, has_grouped_products
from fp8rl_torchrl.precision.matmul import scaled_matmul

A100, L4, H100, B200 = ("NVIDIA A100", (8, 0)), ("NVIDIA L4", (8, 9)), ("NVIDIA H100", (9, 0)), ("NVIDIA B200", (10, 0))


@pytest.fixture(autouse=True)
def forget():
    """What was found on a simulated machine is not true of this one."""
    float8_capability.cache_clear()
    yield
    float8_capability.cache_clear()


@pytest.fixture
def gpus(monkeypatch):
    """Call with (name, capability) of each GPU of a simulated machine."""

    def simulate(*found, hip=None):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found[torch.device(device).index or 0][0])
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: found[torch.device(device).index or 0][1]
        )

    return simulate


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(capability.platform, "processor", lambda: "arm")


# --- devices ---


def test_a_cpu_emulates_and_says_that_it_is_slower():
    found = float8_capability("cpu")
    assert (found.device, found.backend, found.ensembles) == ("cpu", "emulated", "batched products")
    assert found.reason == "no FP8 hardware is used; slower than FP32"
    assert found.hardware
    assert found == float8_capability(torch.device("cpu"))


@pytest.mark.parametrize(
    ("gpu", "backend", "ensembles", "reason"),
    [
        (("NVIDIA V100", (7, 0)), "emulated", "batched products", "capability 7.0; FP8 needs 8.9 or later"),
        (A100, "emulated", "batched products", "capability 8.0; FP8 needs 8.9 or later"),
        (("NVIDIA RTX 3090", (8, 6)), "emulated", "batched products", "capability 8.6; FP8 needs 8.9 or later"),
        (L4, "native", "a launch a member", "capability 8.9"),
        (H100, "native", "one grouped product (e4m3 into BF16), else a launch a member", "capability 9.0"),
        (B200, "native", "a launch a member", "capability 10.0"),
        (("NVIDIA RTX 5090", (12, 0)), "native", "a launch a member", "capability 12.0"),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else None,
)
def test_nvidia(gpus, gpu, backend, ensembles, reason):
    gpus(gpu)
    found = float8_capability("cuda:0")
    assert dataclasses.astuple(found) == ("cuda:0", gpu[0], backend, ensembles, reason)
    assert choose_backend(torch.device("cuda:0")) == backend
    assert has_grouped_products(torch.device("cuda:0")) is (gpu is H100)


def test_two_gpus_of_different_kinds(gpus):
    gpus(A100, H100)
    assert [choose_backend(f"cuda:{index}") for index in (0, 1)] == ["emulated", "native"]


def test_amd_is_emulated_whatever_its_capability(gpus):
    gpus(("AMD Instinct MI300X", (9, 4)), hip="7.2")
    found = float8_capability("cuda:0")
    assert (found.hardware, found.backend) == ("AMD Instinct MI300X", "emulated")
    assert "FP8 hardware is not used" in found.reason
    assert "untested" in found.reason
    assert choose_backend("cuda:0") == "emulated"
    with pytest.raises(RuntimeError, match=r"no native FP8 products on AMD Instinct MI300X.*use backend='emulated'"):
        choose_backend("cuda:0", "native")


def test_apples_mps_has_none(mps):
    found = float8_capability("mps")
    assert (found.hardware, found.backend, found.ensembles) == ("Apple arm", None, "none")
    assert "no e5m2" in found.reason
    assert found.reason.endswith("use the CPU")


@pytest.mark.parametrize("backend", ["auto", "native", "emulated"])
def test_apples_mps_is_refused(mps, backend):
    with pytest.raises(RuntimeError, match=r"no FP8 on mps: .*use the CPU"):
        choose_backend("mps", backend)


def test_an_unknown_device_is_emulated_and_says_that_nobody_tried():
    found = float8_capability("xpu")
    assert (found.hardware, found.backend, found.reason) == ("xpu", "emulated", "unknown device; untested")


# --- the choice ---


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_on_a_cpu_native_is_only_taken_when_asked_for(device):
    assert choose_backend(device) == "emulated"
    assert choose_backend(device, "emulated") == "emulated"
    assert choose_backend(device, "native") == "native"


def test_both_can_be_forced_where_both_exist(gpus):
    gpus(H100)
    assert choose_backend("cuda:0", "emulated") == "emulated"
    assert choose_backend("cuda:0", "native") == "native"


def test_native_is_refused_where_there_is_none(gpus):
    gpus(A100)
    message = (
        r"no native FP8 products on NVIDIA A100 \(capability 8.0; FP8 needs 8.9 or later\); use backend='emulated'"
    )
    with pytest.raises(RuntimeError, match=message):
        choose_backend("cuda:0", "native")


@pytest.mark.parametrize("backend", ["banana", "Native", "", None])
def test_an_unknown_backend_is_refused_with_the_names(backend):
    with pytest.raises(ValueError, match=rf"backend must be 'auto', 'native' or 'emulated'; got {backend!r}"):
        choose_backend("cpu", backend)


def test_the_choice_is_what_runs(monkeypatch):
    launches = []
    kernel = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: launches.append(1) or kernel(*args, **kwargs))
    for backend, launched in (("auto", 0), ("emulated", 0), ("native", 1)):
        launches.clear()
        found = operands((16, 16), (16, 16), scaling="tensor")
        scaled_matmul(*found, out_dtype=torch.float32, backend=choose_backend("cpu", backend))
        assert len(launches) == launched


@pytest.mark.gpu
def test_this_gpu_is_what_its_capability_says():
    found = float8_capability("cuda:0")
    assert found.hardware == torch.cuda.get_device_name(0)
    expected = torch.version.hip is None and torch.cuda.get_device_capability(0) >= (8, 9)
    assert found.backend == ("native" if expected else "emulated")
    left, left_scale, right, right_scale = operands((16, 16), (16, 16), scaling="tensor", device="cuda")
    arguments = {"out_dtype": torch.float32, "backend": found.backend}
    assert scaled_matmul(left, left_scale, right, right_scale, **arguments).isfinite().all()


# --- the table ---


def test_the_table_of_a_machine_with_everything(gpus, mps):
    gpus(A100, H100)
    header, *rows = capability_table().splitlines()
    assert header.split() == ["device", "hardware", "FP8", "products", "ensembles", "why"]
    assert [row.split()[0] for row in rows] == ["cpu", "cuda:0", "cuda:1", "mps"]
    # Every row's cells begin where the header's do.
    for column, cells in {
        "hardware": ["", "NVIDIA A100", "NVIDIA H100", "Apple arm"],
        "FP8 products": ["emulated", "emulated", "native", "none"],
        "ensembles": ["batched products", "batched products", "one grouped product", "none"],
        "why": ["no FP8 hardware", "capability 8.0", "capability 9.0", "MPS: no e5m2"],
    }.items():
        start = header.index(column)
        for row, cell in zip(rows, cells, strict=True):
            assert row[start - 2 : start] == "  "
            assert row[start:].startswith(cell)
            assert row[start] != " "
    assert not any(row.endswith(" ") for row in rows)


def test_the_command_prints_the_table_of_this_machine(capsys):
    runpy.run_module("fp8rl_torchrl.precision", run_name="__main__")
    first, *table = capsys.readouterr().out.splitlines()
    assert first == f"PyTorch {torch.__version__}"
    assert "\n".join(table) == capability_table()


@pytest.mark.slow
def test_the_command_runs_from_the_shell():
    result = subprocess.run(
        [sys.executable, "-m", "fp8rl_torchrl.precision"], capture_output=True, text=True, check=True
    )
    assert "emulated" in result.stdout
    assert not result.stderr
