"""Steps that take turns, and what happens to those that fail."""

import json

import pytest
import torch
from timing import aligned, attempt, ratios, take_turns, write_records

CPU = torch.device("cpu")


def test_steps_take_turns():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "ab"}
    times, failures = take_turns(steps, CPU, repeats=3, seconds=0.0)
    assert "".join(called) == "aabb" + "ab" * 3, "warmed up, tried once, then in turns"
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}
    assert all(taken >= 0 for each in times.values() for taken in each)
    assert not failures


def test_a_turn_lasts_about_as_long_as_asked():
    calls = [0]

    def step():
        calls[0] += 1
        sum(range(20_000))

    take_turns({"step": step}, CPU, repeats=1, seconds=0.05)
    assert calls[0] > 2 + 5  # some 0.3 ms each


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_step_that_fails_leaves_the_others_their_times(at):
    calls = [0]

    def failing():
        calls[0] += 1
        if calls[0] == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")

    times, failures = take_turns({"bad": failing, "good": lambda: None}, CPU, repeats=4, seconds=0.0)
    assert failures == {"bad": "out of memory"}
    assert calls[0] == at, "it is not called again"
    assert list(times) == ["good"]
    assert len(times["good"]) == 4


def test_attempts_say_why_they_failed():
    assert attempt(lambda: 3) == (3, None)
    assert attempt(lambda: torch.empty(2**58)) == (None, "out of memory")  # an exbibyte, of a real allocator
    assert attempt(lambda: [][1]) == (None, "IndexError: list index out of range")
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_ratios_are_those_of_neighbours():
    # The machine became ten times slower between the turns: the ratio did not change.
    assert ratios([1.0, 10.0, 30.0], [2.0, 20.0, 10.0]) == {"median": 0.5, "min": 0.5, "max": 3.0}


def test_records_are_appended_and_tables_aligned(tmp_path):
    for value in (1, 2):
        write_records(tmp_path / "r.jsonl", [{"value": value}])
    assert [json.loads(line)["value"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == [1, 2]
    assert aligned(("a", "long"), [("10", "x")]) == " a  long\n10     x"
