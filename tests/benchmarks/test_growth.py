"""The cost of growth: exponents, what is called superlinear, when memory is flat, and one tiny run."""

import json
from dataclasses import asdict

import growth
import pytest
import torch
from growth import NOISE, Options, columns_of, exponents, judged, superlinear
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")


def found_with(columns, time, memory=lambda size: 0.0):
    """Records in which time and memory are functions of the size."""
    found = {}
    for axis, cells in columns.items():
        for cell in cells:
            size = getattr(cell, axis)
            found[cell] = {
                "cell": asdict(cell),
                "failure": None,
                "seconds": {"total": [time(size)] * 3},
                "frames_per_second": cell.frames / time(size),
                "memory_start_bytes": 10**9,
                "memory_peak_bytes": 10**9 + memory(size),
            }
    return found


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_the_exponent_of_a_power_is_that_power(power, factor):
    sizes = [2, 8, 64]
    assert exponents(sizes, [factor * size**power for size in sizes]) == pytest.approx([power] * 2, abs=1e-9)


@pytest.mark.parametrize(("axis", "fair"), [("num_envs", 1), ("width", 2), ("replay_size", 1)])
@pytest.mark.parametrize("measure", ["time", "memory"])
def test_growth_beyond_the_work_is_told_and_growth_with_it_is_not(axis, fair, measure):
    columns = {axis: columns_of(Options(), CPU)[axis]}
    for power, flagged in ((fair, False), (fair + 0.1, False), (fair + 0.2, True), (fair - 1, False)):
        if measure == "time":
            found = found_with(columns, lambda size, power=power: 1e-3 * size**power)
        else:
            found = found_with(columns, lambda _: 1.0, lambda size, power=power: NOISE * size**power)
        said = superlinear(columns, found)
        assert (said != ["nothing grows by more than the work does"]) is flagged, (power, said)
        if flagged:
            assert len(said) == len(columns[axis]) - 1
            assert f"{measure} grows with the power {power:.2f}" in said[0]


def test_one_bad_step_is_told_alone_and_noise_in_small_memory_is_not():
    columns = {"num_envs": columns_of(Options(num_envs=(1, 10, 100)), CPU)["num_envs"]}
    found = found_with(columns, {1: 1.0, 10: 10.0, 100: 200.0}.get, {1: 1e3, 10: 1e6, 100: 2.0**24}.get)
    (said,) = superlinear(columns, found)
    assert said.startswith("superlinear: from 10 to 100 environments, time grows with the power 1.30")


def test_a_size_that_failed_is_left_out():
    columns = columns_of(Options(num_envs=(1, 10, 100)), CPU)
    found = found_with(columns, lambda size: 1e-3 * size)
    found[columns["num_envs"][1]] = {"cell": {}, "failure": "out of memory"}
    superlinear(columns, found)
    assert "out of memory" in growth.table(columns, found)


@pytest.mark.parametrize(("last", "flat"), [(1000, True), (1009, True), (1011, False), (991, True), (980, False)])
def test_memory_is_flat_within_one_percent(last, flat):
    samples = [1000] * 5 + [5000] * 40 + [last] * 5
    result = judged({"failure": None, "samples": samples, "train_seconds": 60.0, "frames": 10})
    assert result["flat_to_1_percent"] is flat
    assert (result["first_bytes"], result["last_bytes"]) == (1000, last)
    assert ("NOT flat" in result["words"]) is not flat


def test_a_failed_long_run_is_not_called_flat():
    assert judged({"failure": "out of memory"})["flat_to_1_percent"] is None


def test_a_tiny_run_and_records_used_again(capsys, tmp_path):
    small = ("--device=cpu", "--no-compile", "--num-envs=4", "--widths", "--replay-sizes", "--repeats=2")
    small = (*small, "--seconds=0.001")
    assert growth.main([*small, "--out=r/growth"]) == 0
    (first,) = [json.loads(line) for line in (tmp_path / "r/growth.jsonl").read_text().splitlines()]
    assert first["failure"] is None
    assert (tmp_path / "r/growth.png").stat().st_size > 1000
    assert "0 of 1 sizes are in" in capsys.readouterr().out

    assert growth.main([*small, "--out=r/again", "--records=r/growth.jsonl"]) == 0
    assert "1 of 1 sizes are in r/growth.jsonl" in capsys.readouterr().out
    assert json.loads((tmp_path / "r/again.jsonl").read_text()) == first, "not measured again"


def test_records_of_another_commit_are_not_used(monkeypatch, capsys, tmp_path):
    ran = []
    (cell,) = columns_of(Options(num_envs=(4,), widths=(), replay_sizes=()), CPU)["num_envs"]
    (record,) = found_with({"num_envs": [cell]}, lambda _: 1.0).values()
    environment = growth.made_with() | {"allocator": growth.allocator()}
    (tmp_path / "r.jsonl").write_text(json.dumps(record | environment | {"commit": "another"}) + "\n")
    monkeypatch.setattr(growth.Runner, "run", lambda _, cell: ran.append(cell) or record)
    argv = ["--device=cpu", "--num-envs=4", "--widths", "--replay-sizes", "--records=r.jsonl", "--out=g"]
    assert growth.main(argv) == 0
    assert ran == [cell]


@pytest.mark.slow
def test_a_short_flat_run(capsys, tmp_path):
    argv = ["--device=cpu", "--no-compile", "--num-envs", "--widths", "--replay-sizes", "--flat-minutes=0.02"]
    assert growth.main([*argv, "--out=g"]) == 0
    record = json.loads((tmp_path / "g.jsonl").read_text())
    assert record["failure"] is None
    assert len(record["samples"]) >= 2
    assert record["flat_to_1_percent"] is (abs(record["last_bytes"] / record["first_bytes"] - 1) < 0.01)
    assert "resident memory over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-envs", "0"], "must be >= 1"),
        (["--replay-sizes", "10"], "replay-sizes must hold a collection of 125 × 8"),
        (["--flat-minutes", "-1"], "flat-minutes >= 0"),
        (["--num-envs", "--widths", "--replay-sizes"], "name at least one size"),
        (["--precision", "banana"], "banana"),
    ],
)
def test_refusals(argv, message, capsys, tmp_path):
    try:
        code = growth.main([*argv, "--out=r/growth"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    output = capsys.readouterr()
    assert message in " ".join((output.err + output.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())
