"""The ensemble benchmark: both ways compute the same, and what is recorded."""

import json

import ensemble
import pytest
import torch
from layers import Layer

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["fp32", "fp8-rowwise", "fp8-tensorwise", "fp8-rowwise-gw-hp"])
def test_both_ways_compute_the_same(mode):
    layers = [Layer(mode, 32, 16, CPU, seed) for seed in range(3)]
    separate, together = ensemble.both_ways(layers)
    one_by_one, at_once = separate(), together()
    assert len(one_by_one) == 3 * len(at_once) == 12
    for place, of_all in enumerate(at_once):
        members = torch.stack(one_by_one[place :: len(at_once)])
        assert of_all.shape == members.shape
        assert (of_all.double() - members.double()).norm() <= 1e-5 * members.double().norm()
        assert not torch.equal(members[0], members[1])


def test_records_and_table(capsys, tmp_path):
    argv = ["--device=cpu", "--widths", "16", "512", "--batches=16", "--sizes=2", "--repeats=3", "--seconds=0.001"]
    assert ensemble.main([*argv, "--modes", "bf16", "fp8-tensorwise", "--out=r/e"]) == 0
    with open("r/e.jsonl") as file:
        found = {(r["mode"], r["width"]): r for r in map(json.loads, file)}
    assert len(found) == 4
    assert [found["fp8-tensorwise", width]["target"] for width in (16, 512)] == [0.7, 1.05]
    for (mode, _), record in found.items():
        seconds, ratio = record["seconds"], record["ratio"]
        each = sorted(a / b for a, b in zip(seconds["ensemble"], seconds["separate"], strict=True))
        assert [ratio["min"], ratio["median"], ratio["max"]] == each
        assert record["ensembles"] == "batched products"
        assert record["met"] == (None if mode == "bf16" else ratio["median"] <= record["target"])
    met = sum(record["met"] or 0 for record in found.values())
    assert f"target met in {met} of 2 FP8 cells" in capsys.readouterr().out
    assert (tmp_path / "r/e.png").stat().st_size > 10_000


def test_cells_that_do_not_fit_are_recorded(monkeypatch):
    def full(layers):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ensemble, "both_ways", full)
    cell = ensemble.measure("fp32", 2, 16, 16, CPU, ensemble.Options())
    assert (cell["failure"], cell["ratio"], cell["met"]) == ("out of memory", None, None)
    assert "out of memory" in ensemble.table([cell])


def test_refusals(capsys):
    try:
        code = ensemble.main(["--modes", "banana", "--out=r/e"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert "banana" in capsys.readouterr().err
