"""The update of a wide actor-critic in every precision: it runs, records, and says what failed."""

import json

import pytest
import wide_update


def test_every_precision_is_measured_and_recorded(tmp_path, capsys):
    out = tmp_path / "wide"
    small = ["--width", "32", "--layers", "2", "--batch", "64", "--repeats", "2", "--seconds", "0.01", "--no-compile"]
    modes = ["--modes", "fp32", "bf16", "fp8"]
    assert wide_update.main([*small, *modes, "--device", "cpu", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["mode"] for record in records] == ["fp32", "bf16", "fp8"]
    assert all(len(record["seconds"]) == 2 and record["failure"] is None for record in records)
    assert "× bf16" in capsys.readouterr().out


def test_ratios_are_speed_ups():
    records = [
        {"mode": "bf16", "seconds": [0.002, 0.004], "failure": None},
        {"mode": "fp8", "seconds": [0.001, 0.002], "failure": None},
        {"mode": "fp8-tensorwise", "seconds": None, "failure": "out of memory"},
    ]
    lines = wide_update.table(records).splitlines()
    assert lines[2].split() == ["fp8", "1.50", "2.00", "(2.00–2.00)"]
    assert "out of memory" in lines[3]


@pytest.mark.parametrize("argv", [["--width", "0"], ["--modes", "fp9"], ["--device", "nowhere"]])
def test_bad_input_is_refused(argv, tmp_path, capsys):
    assert wide_update.main([*argv, "--out", str(tmp_path / "x" / "y")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
