"""Records: found again where nothing that they depend on has changed, also after a kill."""

import ledger
import pytest
from ledger import Ledger, digest, package_files

RUN = {"recipe": "a2c", "config": {"hidden": (64, 64), "lr": None}}


def test_a_record_is_found_again_by_another_process(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    record = Ledger(path).add(RUN, "c0de", {"failure": None, "frames": 3})
    again = Ledger(path)
    assert again.find(RUN, "c0de") == record == again.records[0]
    assert record["versions"]["torch"]
    assert record["hardware"]["cpu"]
    assert "commit" in record


def test_what_it_depends_on_must_be_the_same(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    Ledger(path).add(RUN, "c0de", {"failure": None})
    assert Ledger(path).find(RUN | {"config": {"hidden": (64, 32), "lr": None}}, "c0de") is None
    assert Ledger(path).find(RUN | {"seed": 1}, "c0de") is None
    assert Ledger(path).find(RUN, "0ther") is None
    assert Ledger(path).newest({"recipe": "a2c"}) is not None, "where neither code nor settings matter"
    assert Ledger(path).newest({"recipe": "ppo"}) is None
    made = ledger.made_with()
    for part, name in (("versions", "torch"), ("hardware", "cpu")):
        changed = made | {part: made[part] | {name: "another"}}
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "made_with", lambda changed=changed: changed)
            assert Ledger(path).find(RUN, "c0de") is None, name
    monkeypatch.setattr(ledger, "made_with", lambda: made | {"commit": "another"})
    assert Ledger(path).find(RUN, "c0de") is not None, "a commit that changes no code changes no result"


def test_the_newest_counts_and_a_failure_does_not(tmp_path):
    book = Ledger(tmp_path / "r.jsonl")
    book.add(RUN, "c0de", {"failure": None, "n": 1})
    book.add(RUN, "c0de", {"failure": None, "n": 2})
    book.add(RUN, "c0de", {"failure": "out of memory"})
    assert book.find(RUN, "c0de")["n"] == 2
    assert book.newest({"recipe": "a2c"})["failure"] == "out of memory"
    failed = Ledger(tmp_path / "f.jsonl")
    failed.add(RUN, "c0de", {"failure": "out of memory"})
    assert failed.find(RUN, "c0de") is None, "it is tried again"


@pytest.mark.parametrize("cut", [1, 5])
def test_a_line_that_a_kill_cut_short_is_left_out_and_spoils_no_other(cut, tmp_path):
    path = tmp_path / "r.jsonl"
    book = Ledger(path)
    book.add(RUN, "c0de", {"failure": None, "n": 1})
    book.add(RUN | {"seed": 1}, "c0de", {"failure": None, "n": 2})
    path.write_text(path.read_text()[: -cut - 1])
    after = Ledger(path)
    assert [record["n"] for record in after.records] == [1]
    after.add(RUN | {"seed": 1}, "c0de", {"failure": None, "n": 3})
    after.add(RUN | {"seed": 2}, "c0de", {"failure": None, "n": 4})
    assert [record["n"] for record in Ledger(path).records] == [1, 3, 4]


def test_code_is_told_by_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("x = 1")
    b.write_text("")
    before = digest([a, b])
    assert digest([b, a]) == before
    assert digest([a]) != before
    a.write_text("x = 2")
    assert digest([a, b]) != before
    a.write_text("")
    b.write_text("x = 1")
    assert digest([a, b]) != before, "the same texts in other files"


def test_every_file_of_the_package_counts():
    names = {file.relative_to(ledger.ROOT).as_posix() for file in package_files()}
    assert {"fp8rl_torchrl/__init__.py", "fp8rl_torchrl/training/step.py", "fp8rl_torchrl/recipes/ppo.py"} <= names
    assert all(name.startswith("fp8rl_torchrl/") for name in names)
    assert len(digest(package_files())) == 12
