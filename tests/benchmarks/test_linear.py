"""The linear benchmark on small layers: its records, its table, its refusals."""

import json

import linear
import pytest
import torch
from layers import Layer

SMALL = ("--device=cpu", "--widths=16", "--batches", "16", "32", "--repeats=3", "--seconds=0.001", "--out=r/linear")


@pytest.fixture(autouse=True)
def _known_peaks(monkeypatch):
    peaks = linear.Peaks({"fp32": 1e12, "bf16": 2e12}, 1e11, "by hand")
    monkeypatch.setattr(linear, "peaks_of", lambda device: peaks)


def records():
    with open("r/linear.jsonl") as file:
        return {(r["mode"], r["width"], r["batch"]): r for r in map(json.loads, file)}


def test_records_and_table(capsys, tmp_path):
    assert linear.main([*SMALL, "--profile", "16", "32"]) == 0
    found, output = records(), capsys.readouterr().out
    modes = ("fp32", "bf16", "fp8-rowwise", "fp8-tensorwise", "fp8-rowwise-gw-hp")
    assert set(found) == {(mode, 16, batch) for mode in modes for batch in (16, 32)}
    assert "tf32 is left out" in output
    for (mode, width, batch), record in found.items():
        assert record["failure"] is None
        assert len(record["seconds"]) == 3
        median = sorted(record["seconds"])[1]
        assert record["seconds_median"] == median
        assert record["tflops"] == pytest.approx(6 * batch * width**2 / median / 1e12)
        ratio, base = record["speedup_over_bf16"], found["bf16", width, batch]["seconds"]
        each = sorted(b / mine for b, mine in zip(base, record["seconds"], strict=True))
        assert [ratio["min"], ratio["median"], ratio["max"]] == pytest.approx(each)
        assert record["launch"] == "calls"
        assert ("emulated" in record["products"].values()) == mode.startswith("fp8")
        assert (record["estimate_seconds"] is None) == mode.startswith("fp8"), "no peak, no estimate"
        assert {"versions", "hardware", "commit", "peaks", "config"} <= set(record)
    assert found["bf16", 16, 32]["speedup_over_bf16"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert output.count("fp8-tensorwise") == 2
    assert (tmp_path / "r/linear.png").stat().st_size > 10_000
    profile = (tmp_path / "r/linear_profile.txt").read_text()
    assert profile.count("batch 32: ") == len(modes)
    assert "aten::mm" in profile


def failing(error):
    """A step that raises in fp8-rowwise."""
    step = Layer.step

    def or_not(layer):
        if layer.precision.name == "fp8-rowwise":
            raise error
        step(layer)

    return or_not


def test_cells_that_do_not_fit_are_recorded(monkeypatch, capsys):
    monkeypatch.setattr(Layer, "step", failing(torch.OutOfMemoryError("out of memory")))
    assert linear.main(list(SMALL)) == 0
    found = records()
    assert found["fp8-rowwise", 16, 32]["failure"] == "out of memory"
    assert found["fp8-rowwise", 16, 32]["seconds"] is None
    assert found["fp8-tensorwise", 16, 32]["seconds_median"] > 0
    assert capsys.readouterr().out.count("out of memory") == 2


def test_other_failures_are_recorded_and_fatal_in_the_end(monkeypatch, capsys):
    monkeypatch.setattr(Layer, "step", failing(RuntimeError("no such kernel")))
    assert linear.main(list(SMALL)) == 1
    assert "failed: RuntimeError: no such kernel" in capsys.readouterr().err
    assert records()["fp8-rowwise", 16, 32]["failure"] == "RuntimeError: no such kernel"
    assert records()["fp8-tensorwise", 16, 32]["seconds_median"] > 0


def test_the_most_telling_come_first_and_time_ends_it(capsys):
    order = linear.by_importance((256, 4096, 8192), (1024, 16384))
    assert order[:2] == [(4096, 16384), (8192, 16384)]
    assert order[-1] == (256, 1024)
    assert linear.main([*SMALL, "--minutes", "0"]) == 0
    assert "not measured: 16×32, 16×16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--modes", "fp32", "fp8"], "must name bf16"),
        (["--modes", "bf16", "banana"], "banana"),
        (["--executions", "fast"], "eager and compiled; got fast"),
        (["--widths", "0"], "must be >= 1"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
    ],
)
def test_refusals(argv, message, capsys, tmp_path):
    try:
        code = linear.main([*argv, "--out=r/linear"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    output = capsys.readouterr()
    assert message in " ".join((output.err + output.out).replace("│", " ").split())
    assert "Traceback" not in output.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiled_cells():
    modes = ("--modes", "bf16", "fp8-rowwise", "--executions", "compiled", "eager")
    argv = ["--device=cpu", "--widths=16", "--batches=32", "--repeats=2", "--out=r/linear", *modes]
    assert linear.main(argv) == 0
    with open("r/linear.jsonl") as file:
        found = {(r["mode"], r["execution"]): r for r in map(json.loads, file)}
    assert len(found) == 4
    for record in found.values():
        assert record["seconds_median"] > 0
    assert found["fp8-rowwise", "compiled"]["saved_bytes"] == found["fp8-rowwise", "eager"]["saved_bytes"]
