"""Keeping freed memory: it is asked of the C library, and tensors of a few MB come back at once."""

import subprocess
import sys

import pytest

from fp8rl_torchrl.training.memory import keep_freed_memory

PROGRAM = """
import resource, torch
from fp8rl_torchrl.training.memory import keep_freed_memory
assert {keep} is False or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(8 * 2**20 // 4 * 8)  # 64 MiB: beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def page_faults(keep):
    program = PROGRAM.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_tensors_reuse_their_memory():
    assert page_faults(keep=True) < 100
    assert page_faults(keep=False) > 1000


def test_elsewhere_it_says_that_it_did_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
