"""The replay benchmark: what it compares is the same, and what it records."""

import json

import pytest
import replay
import torch

CPU = torch.device("cpu")
SMALL = ("--device=cpu", "--sizes", "100", "5000", "--repeats=3", "--seconds=0.001", "--count=4", "--out=r/replay")


def test_all_ways_draw_the_same_batches():
    ways = replay.ways(5000, CPU, replay.Options(count=2))
    drawn = {}
    for name, draw in ways.items():
        torch.manual_seed(0)
        drawn[name] = [draw(), draw()] if name != "sample_many" else draw()
    for stock, sample, many in zip(*drawn.values(), strict=True):
        assert stock.batch_size == (64,)
        assert set(stock.keys(True, True)) >= {"observation", "action", ("next", "reward"), ("next", "terminated")}
        assert (stock == sample).all()
        assert (stock == many).all()
    assert not (drawn["stock"][0] == drawn["sample"][1]).all()


def test_records_and_table(capsys):
    assert replay.main(list(SMALL)) == 0
    assert replay.main(list(SMALL)) == 0
    with open("r/replay.jsonl") as file:
        records = [json.loads(line) for line in file]
    assert [record["size"] for record in records] == [100, 5000] * 2, "appended, not overwritten"
    output = capsys.readouterr().out
    for record in records:
        assert record["failures"] == {}
        assert {"versions", "hardware", "commit", "config"} <= set(record)
        for name in ("sample", "sample_many"):
            pairs = zip(record["seconds"]["stock"], record["seconds"][name], strict=True)
            each = sorted(stock / mine for stock, mine in pairs)
            found = record["speedup"][name]
            assert [found["min"], found["median"], found["max"]] == each
            assert f"{found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})" in output
        assert record["seconds_median"]["stock"] == sorted(record["seconds"]["stock"])[1]


def test_a_way_that_fails_is_recorded_and_fatal_in_the_end(monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(replay.PackedReplayBuffer, "sample_many", failing)
    assert replay.main(list(SMALL)) == 1
    assert "failed: RuntimeError: no such kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"), [(["--count", "0"], "must be >= 1"), (["--device", "cuda:99"], "no device 'cuda:99' here")]
)
def test_refusals(argv, message, capsys, tmp_path):
    try:
        code = replay.main([*argv, "--out=r/replay"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    output = capsys.readouterr()
    assert message in " ".join((output.err + output.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())
