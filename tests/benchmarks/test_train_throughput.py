"""The training benchmark: its cells, its table and picture, and one tiny run."""

import json

import pytest
import torch
import train_throughput
from train_throughput import Options, cells_of, share, table

CPU = torch.device("cpu")


def test_there_is_a_cell_for_each_combination_and_a_buffer_only_where_one_is_used():
    options = Options(num_envs=(1, 4096), widths=(64, 256), precisions=("fp32", "bf16"))
    cells = cells_of(options, CPU)
    assert len(set(cells)) == 8
    assert {cell.replay_size for cell in cells} == {0}
    replayed = cells_of(Options(algo="actor-critic", num_envs=(1, 4096), widths=(64,), precisions=("fp32",)), CPU)
    assert [cell.replay_size for cell in replayed] == [10_000, 32_768], "at least a collection"


def test_shares_are_of_what_was_measured_and_a_negative_rest_counts_as_nothing():
    ns = {"env": 1.0, "policy": 2.0, "replay": 0.0, "update": 5.0, "rest": 2.0, "total": 10.0}
    assert [share(ns, part) for part in ("env", "update", "rest")] == [10, 50, 20]
    ns |= {"rest": -3.0, "total": 5.0}
    assert [share(ns, part) for part in ("env", "update", "rest")] == [12.5, 62.5, 0]


def test_one_tiny_run(capsys, tmp_path):
    given = ("--device=cpu", "--no-compile", "--num-envs=4", "--widths=16", "--precisions=fp32", "--repeats=2")
    assert train_throughput.main([*given, "--seconds=0.001", "--out=r/train"]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "r/train.jsonl").read_text().splitlines()]
    assert record["failure"] is None
    assert {"versions", "hardware", "commit", "config", "cell", "seconds"} <= set(record)
    assert record["ns_per_frame"]["replay"] == 0
    output = capsys.readouterr().out
    assert f"{record['frames_per_second']:,.0f}" in output
    assert (tmp_path / "r/train.png").stat().st_size > 1000


def test_what_is_not_measured_is_named(capsys, tmp_path):
    given = ("--device=cpu", "--num-envs=4", "--widths=16", "--precisions=fp32", "--minutes=-1", "--out=r/train")
    assert train_throughput.main(list(given)) == 0
    output = capsys.readouterr().out
    assert "not measured (environments × width): 4×16 fp32" in output
    assert "the budget is spent" in output
    assert not (tmp_path / "r/train.png").exists()


def test_a_cell_that_breaks_is_fatal_in_the_end(monkeypatch, capsys):
    monkeypatch.setattr(train_throughput.Runner, "run", lambda *_: {"failure": "RuntimeError: no such kernel"})
    assert train_throughput.main(["--device=cpu", "--num-envs=4", "--widths=16", "--out=r/train"]) == 1
    assert "failed: RuntimeError: no such kernel" in capsys.readouterr().err


def test_a_row_has_as_many_cells_as_the_header():
    failed = {"cell": {"num_envs": 1, "width": 64, "precision": "fp32"}, "failure": "out of memory"}
    assert "out of memory" in table([failed])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-envs", "0"], "must be >= 1"),
        (["--algo", "ppo"], "unknown algo 'ppo'"),
        (["--env", "Pendulum-v1"], "env must be CustomEnv or CartPole-v1"),
        (["--precisions", "banana"], "banana"),
        (["--limit", "0"], "must be > 0"),
        (["--core", "9999"], "core 9999 cannot be used here"),
    ],
)
def test_refusals(argv, message, capsys, tmp_path):
    try:
        code = train_throughput.main([*argv, "--out=r/train"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    output = capsys.readouterr()
    assert message in " ".join((output.err + output.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())
